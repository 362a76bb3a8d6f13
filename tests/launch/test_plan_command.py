"""`python -m launch plan`: what it says, what it refuses, and the prepared experiments at the size of their runs."""

import dataclasses
import functools
import json
import re

import pytest
from omegaconf import OmegaConf

from conf import CONF_DIR
from launch.__main__ import main
from launch.planner.command import read_arguments
from launch.planner.errors import compared_steps, errors_of, percent
from launch.planner.layouts import all_layouts, layout_of
from tests.documented import quoted, table
from tests.runs import ROOT
from tests.train.estimate import invented_gpu
from train.estimate.calibration import SHIPPED, RunPoint, read_calibration
from train.estimate.machine import Machine

SMALL = ["model=xlstm_400m", "training.total_steps=100000"]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """A file of a GPU whose times are known."""
    path = tmp_path_factory.mktemp("calibrations") / "gpu.json"
    dataclasses.replace(invented_gpu.bare(), steps=invented_gpu.steps()).write(path)
    return f"calibration={path}"


def planned(capsys, *arguments):
    code = main(["plan", *arguments])
    return code, capsys.readouterr()


def test_the_page_has_all_that_one_asks_before_booking_gpus(capsys, gpu):
    code, printed = planned(capsys, *SMALL, "nodes=2", gpu)
    assert code == 0 and printed.err == ""
    text = printed.out
    for line in (
        "layout     16 x NVIDIA H200, 16 replicas",
        "memory of a rank, GiB of the 138.2 that a run finds on NVIDIA H200",
        "  it fits; a save takes no more on the GPU, and 0.28 GiB in the memory of its host",
        "a step, ms",
        f"           plans of {len(invented_gpu.steps())} measured steps of the calibration, and not compared with ",
        "           not measured, by data sheet: 360 GB/s of a GPU within a node, 320 GB/s of a node to others",
    ):
        assert line in text, line
    rows = dict(re.findall(r"^  ([a-z][^\d\n]*?) +([\d.]+)(?: .*)?$", text, flags=re.M))
    memory = ["weights", "gradients", "optimizer", "activations, recomputing none", "logits in work"]
    memory += ["states between chunks of the recurrences"]
    assert sum(float(rows[name]) for name in memory) == pytest.approx(float(rows["at the peak"]), abs=0.04)
    # The schedule of the length, and what it costs.
    hours, gpu_hours = re.search(r"the run .* steps: ([\d.,]+) h .*?, ([\d,]+) GPU-hours", text).groups()
    assert float(gpu_hours.replace(",", "")) == pytest.approx(16 * float(hours.replace(",", "")), rel=0.02)
    assert re.search(r"^ +1 +[123] +none +", text, flags=re.M) and "<- this one" in text


def test_programs_get_the_same_as_json(capsys, gpu):
    code, printed = planned(capsys, *SMALL, "nodes=2", gpu, "--json")
    found = json.loads(printed.out)
    assert code == 0 and found["format_version"] == 1 and found["fits"] == "yes"
    plan = found["plan"]
    assert plan["world_size"] == 16 and found["machines"]["gpus_per_node"] == 8
    step = sum(plan["step_seconds"].values())
    assert plan["predicted_seconds"] == pytest.approx(100_000 * step)
    assert found["gpu_hours"] == pytest.approx(16 * 100_000 * step / 3600)
    best = found["layouts"][0]
    assert best["fits"] == "yes" and best["step_seconds"] <= step * 1.005
    assert [one["step_seconds"] for one in found["layouts"] if one["overrides"] == best["overrides"]]
    assert found["errors"]["count"] == len(invented_gpu.steps())


def test_layouts_are_ranked_by_their_time_among_those_that_fit(gpu):
    machines, config = read_arguments([*SMALL, "training.sequence_length=32768", "gpus_per_node=4", gpu])
    machine = Machine(dataclasses.replace(invented_gpu.bare(), memory_bytes=24 * 2**30), 1, machines.ranks)
    found = all_layouts(config, machine)
    fits = [layout.fits for layout in found]
    assert fits == sorted(fits, key=("yes", "tight", "no").index) and {"yes", "no"} <= set(fits)
    seconds = [layout.seconds for layout in found if layout.fits == "yes"]
    assert all(one <= other * 1.006 for one, other in zip(seconds, seconds[1:], strict=False))
    # In so little room whole samples are recomputed, or shared, and both are among the layouts.
    assert {layout.sequence for layout in found} >= {1, 2, 4} and {layout.pipeline for layout in found} >= {1, 2, 4}
    assert {layout.activation_checkpointing for layout in found if layout.fits == "yes"} >= {"unit"}
    for layout in found[:5]:
        _, again = read_arguments([*SMALL, "training.sequence_length=32768", "gpus_per_node=4", gpu, *layout.overrides])
        assert layout_of(again, machine).seconds == pytest.approx(layout.seconds)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["nodes=0", "layouts=-1", "trainng.total_steps=3"], ["nodes: must be at least 1 (0)", "layouts: must be at"]),
        (["gpu=h300", "nodse=3"], ["gpu: no such calibration ('h300'); choose one of", "nodse: no such key"]),
        (["calibration=none.json"], ["calibration: none.json cannot be read", "name a file of `python -m launch cal"]),
        (["network_gbit=0"], ["network_gbit: must be positive (0"]),
        (["nodes=3"], ["training.global_batch_size: 128 samples do not divide", "on 24 processes"]),
        (["parallel.zero_stage=3", "parallel.pipeline=2"], ["parallel.zero_stage: 3 cuts gradients"]),
        (
            ["precision=fp32"],
            ["precision.compute: products were measured in bf16, not in fp32; plan with precision=bf16"],
        ),
        (["launch.time=1"], ["launch.time: no such key"]),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_to_change(capsys, gpu, arguments, messages):
    given = [*SMALL, *([] if any(one.startswith(("gpu=", "calibration=")) for one in arguments) else [gpu])]
    code, printed = planned(capsys, *given, *arguments)
    assert code == 2 and printed.out == ""
    for message in messages:
        assert message in printed.err


def test_a_length_is_asked_for_and_a_name_and_a_corpus_are_not(capsys, gpu):
    code, printed = planned(capsys, "model=xlstm_400m", gpu)
    assert code == 2 and "training.total_steps: none of total_steps and total_tokens is set" in printed.err
    assert "name:" not in printed.err and "corpus" not in printed.err


def test_a_run_that_does_not_fit_is_planned_all_the_same(capsys, gpu):
    code, printed = planned(
        capsys, "model=xlstm_7b", "training.total_steps=100000", "gpus_per_node=1", gpu, "layouts=2"
    )
    assert code == 0 and "  it does not fit; " in printed.out
    # What would: the first one of those that do.
    assert re.search(r"^the first: parallel.zero_stage=\d parallel.activation_checkpointing=", printed.out, flags=re.M)


def test_errors_are_those_of_the_runs_that_were_measured(gpu):
    calibration = dataclasses.replace(invented_gpu.bare(), steps=invented_gpu.steps())
    compared = list(compared_steps(calibration))
    assert all(abs(one.time_error) < 0.15 for one in compared)
    assert "steps of the calibration, and not compared with whole runs: time" in errors_of(calibration).describe()
    batch = {"sequence_length": 8192, "micro_batch_size": 2, "global_batch_size": 4}
    run = RunPoint("xlstm_400m", batch, {}, 1, 1, 1e5, 2**34, "a test")
    of_runs = errors_of(dataclasses.replace(calibration, runs=[run]))
    assert of_runs.of_runs and of_runs.count == 1 and of_runs.memory > 0
    assert errors_of(invented_gpu.bare()).describe().startswith("compared with no measured step")


def test_plans_of_measured_runs_are_as_near_as_the_documentation_says():
    found = errors_of(read_calibration(SHIPPED / "h200.json"))
    assert found.of_runs and found.count == 16
    assert found.memory is not None and found.memory < 0.011
    assert found.time is not None and found.time < 0.16
    page = (ROOT / "docs" / "planning.md").read_text()
    figures = re.search(
        r"\((\d+) runs of .*memory is within\s([\d.]+) %\sand time\swithin ([\d.]+) %, half of them within ([\d.]+) %",
        page,
        re.S,
    )
    assert figures is not None
    errors = (percent(found.memory), percent(found.time), percent(found.median_time))
    assert [float(figure) for figure in figures.groups()] == [found.count, *errors]


def test_plans_are_as_near_to_the_steps_of_their_calibration():
    """Every width, kind of block, way to run and recomputation that it measured."""
    compared = list(compared_steps(read_calibration(SHIPPED / "h200.json")))
    for one in compared:
        assert one.time_error is not None and abs(one.time_error) < 0.09, one
        assert one.memory_error is None or abs(one.memory_error) < 0.025, one
    assert len(compared) == 18 and sum(one.memory_error is not None for one in compared) == 14


def test_the_documentation_lists_every_experiment_with_its_gpus():
    found = {quoted(name)[0]: int(gpus) for name, _, gpus in table("configuration.md", "experiment")}
    assert found == {name: planned_experiment(name)[0].ranks for name in EXPERIMENTS}


@functools.cache
def planned_experiment(name):
    """What the command that its file names would plan."""
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    (command,) = re.findall(r"^#   python -m launch plan (.*)$", text, flags=re.M)
    assert f"experiment={name} " in command
    return read_arguments(command.split())


# Of published runs: those that make their data by a task have models that no GPU is too small for.
EXPERIMENTS = sorted(
    path.stem
    for path in (CONF_DIR / "experiment").glob("*.yaml")
    if path.stem != "demo" and "task" not in OmegaConf.load(path).get("corpus", {})
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_planned_at_the_size_of_its_run(name):
    """Each file names the command that plans it; there it fits, whatever the layouts around it."""
    machines, config = planned_experiment(name)
    machine = Machine(read_calibration(SHIPPED / f"{machines.gpu}.json"), machines.nodes, machines.ranks)
    assert layout_of(config, machine).fits == "yes"
