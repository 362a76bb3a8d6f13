"""Two steps computed in two ways, under ZeRO stages, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

from tests.runs import run_script

SCRIPT = """
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

given = compose(RunConfig, "train", sys.argv[3:]).parallel
mesh = join_mesh(timedelta(seconds=900), given.pipeline, given.sequence)
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
    for way in json.loads(sys.argv[2]):
        config = compose(RunConfig, "train", [*sys.argv[3:], f"parallel=zero{stage}", f"precision={precision}", *way])
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
            # AdamW's first step goes by the signs of gradients. With longer ones the second pass would tell how often
            # rounding turned a sign, not whether gradients are alike.
            assert engine.step(1e-4, float(norm))
        found.append(of_steps)
        engine.close()
    apart = {"loss": [], "norm": [], "gradient": [], "evaluation": []}
    for one, other in zip(*found, strict=True):
        apart["loss"].append(abs(other[0] / one[0] - 1))
        apart["norm"].append(abs(other[1] / one[1] - 1))
        assert one[2].keys() == other[2].keys()
        apart["gradient"] += [
            float((other[2][key] - gradient).norm() / one[1]) for key, gradient in one[2].items()
        ]
        apart["evaluation"].append(abs(other[3][0] / one[3][0] - 1))
        assert other[3][1] == one[3][1]
    # With its end in one piece: another rank writes at the same time.
    sys.stdout.write(json.dumps([stage, precision, {key: max(values) for key, values in apart.items()}]) + "\\n")
    sys.stdout.flush()
mesh.close()
end_process(0)
"""


def differences(tmp_path: Path, cases: list, ways: list[list[str]], *overrides: str) -> list:
    """How far two steps of the second way are from those of the first, relative: of each case, on each of two ranks."""
    (tmp_path / "gradients.py").write_text(SCRIPT)
    given = [json.dumps(cases), json.dumps(ways), "name=x", "corpus.directory=y", "training.total_steps=2"]
    done = run_script(tmp_path / "gradients.py", [*given, *overrides], processes=2)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == 2 * len(cases)
    return found


def check_two_ways(tmp_path: Path, cases: list, ways: list[list[str]], *overrides: str) -> None:
    """Both ways have the same losses, gradients and held-out losses."""
    for stage, precision, apart in differences(tmp_path, cases, ways, *overrides):
        # The facts have 5e-3 for a loss in bf16; of a gradient it is a share of the norm of all.
        limit = 1e-5 if precision == "fp32" else 2e-2
        assert max(apart.values()) <= limit, (stage, precision, apart)
