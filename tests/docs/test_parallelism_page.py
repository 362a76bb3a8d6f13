"""docs/parallelism.md: the layouts that it recommends can be planned and fit, and its messages are those of a run."""

import re

import pytest

from conf import compose
from tests.runs import ROOT
from train.config import RunConfig
from train.memory_check import GPU_FACTOR
from train.plan import make_plan
from train.validate import validate

PAGE = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
# What is free of a GPU, in GiB, when a run starts.
GPUS = {"80 GB": ("NVIDIA H100 80GB HBM3", 78), "141 GB": ("NVIDIA H200", 138)}


def composed(*overrides):
    return compose(
        RunConfig, "train", ["name=x", "corpus.directory=y", "training.total_tokens=100_000_000_000", *overrides]
    )


def rows(model):
    """{column: cell} of every layout that the page recommends for a model."""
    table = re.search(rf"^With `model={model}`[^|]*\n\n((?:\|.*\n)+)", PAGE, flags=re.M)
    head, _, *lines = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in table[1].splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["xlstm_1b4", "xlstm_7b"])
def test_recommended_layouts_fit(model):
    found = rows(model)
    assert {(int(row["GPUs"]), int(row["training.sequence_length"])) for row in found} == {
        (gpus, length) for gpus in (1, 8, 64, 128) for length in (8192, 131072, 1048576)
    }
    for row in found:
        config = composed(f"model={model}", *(f"{key}={value}" for key, value in row.items() if "." in key))
        processes, (device, room) = int(row["GPUs"]), GPUS[row["GPU"]]
        assert validate(config, processes) == [], row
        gib = make_plan(config, processes, device).rank_bytes / 2**30
        assert f"{gib:.1f}" == row["GiB a GPU"], row
        assert gib * GPU_FACTOR <= room, row


def test_the_largest_model_does_not_fit_one_gpu_of_80_gb():
    plan = make_plan(composed("model=xlstm_7b"), 1, GPUS["80 GB"][0])
    lasting = (plan.weight_bytes + plan.gradient_bytes + plan.optimizer_bytes) / 2**30
    assert f"take {lasting:.0f} GiB, so one GPU of 80 GB cannot" in PAGE


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        (["training.cuda_graphs=true", "parallel.sequence=2"], 2),
        (["training.cuda_graphs=true", "parallel.pipeline=2"], 2),
        (["training.cuda_graphs=true", "training.time_chunk=8192"], 1),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_message_of_the_page(overrides, processes):
    (problem,) = validate(composed(*overrides, "model=xlstm_7b", "training.sequence_length=16384"), processes)
    assert f"\n{problem}\n" in PAGE
