"""Time chunks under every ZeRO stage: DeepSpeed reduces the gradients of all of them, once."""

import json

import pytest

from tests.runs import TINY_RUN, run_script

GRADIENTS = """
import json
import sys
from datetime import timedelta

import torch

from conf import compose
from data_pipeline.reading.batch import Batch
from train.__main__ import end_process
from train.config import RunConfig
from train.parallel.engine import make_engine
from train.parallel.mesh import join_mesh
from train.plan import make_plan
from train.restore import drawn_weights

mesh = join_mesh(timedelta(seconds=900))
generator = torch.Generator().manual_seed(mesh.rank)


def batch():
    tokens = torch.randint(0, 384, (2, 32), generator=generator)
    targets = torch.randint(0, 384, (2, 32), generator=generator)
    targets[0, 10:25] = -100
    document_start = torch.rand(2, 32, generator=generator) < 0.1
    return Batch(tokens, targets, document_start, ["a", "a"])


steps = [[batch(), batch()] for _ in range(2)]
for stage, precision in json.loads(sys.argv[1]):
    found = []
    for chunk in ("null", "12"):
        overrides = [f"parallel=zero{stage}", f"precision={precision}", f"training.time_chunk={chunk}"]
        config = compose(RunConfig, "train", [*sys.argv[2:], *overrides])
        engine = make_engine(config, make_plan(config, mesh.size), mesh)
        engine.fill(drawn_weights(config), 0)
        of_steps = []
        for micro_batches in steps:
            valid = mesh.sum(torch.tensor(float(sum(b.scored_targets() for b in micro_batches))), group="world")
            loss = mesh.sum(engine.train_batch(micro_batches, valid), group="world")
            norm = engine.gradient_norm()
            # A clone: at ZeRO-1 the next step adds to the same memory.
            gradients = {(f.name, f.offset): f.gradient().float().clone() for f in engine.fragments}
            of_steps.append((float(loss), float(norm), gradients, engine.evaluate_batch(micro_batches[0])))
            assert engine.step(1e-2, float(norm))
        found.append(of_steps)
        engine.close()
    apart = {"loss": [], "norm": [], "gradient": [], "evaluation": []}
    for one, chunked in zip(*found, strict=True):
        apart["loss"].append(abs(chunked[0] / one[0] - 1))
        apart["norm"].append(abs(chunked[1] / one[1] - 1))
        assert one[2].keys() == chunked[2].keys()
        apart["gradient"] += [
            float((chunked[2][key] - gradient).norm() / one[1]) for key, gradient in one[2].items()
        ]
        apart["evaluation"].append(abs(chunked[3][0] / one[3][0] - 1))
        assert chunked[3][1] == one[3][1]
    print(json.dumps([stage, precision, {key: max(values) for key, values in apart.items()}]), flush=True)
mesh.close()
end_process(0)
"""
HYBRID = ["model.attention_at=[2]", "+model.attention.n_heads=4", "+model.attention.n_kv_heads=2"]


def differences(tmp_path, cases, *overrides):
    """How far two steps in time chunks are from those in one pass, relative: of each case, the worst rank's."""
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    given = [json.dumps(cases), *TINY_RUN, *HYBRID, "name=x", "corpus.directory=y", "training.total_steps=2"]
    done = run_script(tmp_path / "gradients.py", [*given, "training.z_loss_weight=1e-4", *overrides], processes=2)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == 2 * len(cases)
    return found


def check(tmp_path, cases, *overrides):
    for stage, precision, apart in differences(tmp_path, cases, *overrides):
        # The facts have 5e-3 for a loss in bf16; of a gradient it is a share of the norm of all.
        limit = 1e-5 if precision == "fp32" else 2e-2
        assert max(apart.values()) <= limit, (stage, precision, apart)


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one_pass(tmp_path):
    """ZeRO-1 is run through by tests/train/checkpoints/test_carry_state.py."""
    check(tmp_path, [(3, "fp32")])


@pytest.mark.slow
@pytest.mark.layouts
def test_two_ranks_have_the_gradients_of_one_pass_under_every_stage_and_precision(tmp_path):
    check(tmp_path, [(0, "fp32"), (1, "fp32"), (2, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")])


@pytest.mark.slow
@pytest.mark.layouts
def test_activation_checkpointing_inside_chunks_under_zero(tmp_path):
    check(tmp_path, [(1, "fp32"), (3, "fp32"), (3, "bf16")], "parallel.activation_checkpointing=block")
