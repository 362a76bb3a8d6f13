"""What an earlier release wrote, this version reads: its corpus opens, its runs go on and compute what they would have.

Bit for bit where this machine computes the same bits as the one that made the fixture, else to rounding. Whether it
does, the steps before the fixture's checkpoint tell: trained anew, they are compared in every weight and moment.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from data_pipeline.__main__ import main as data_pipeline
from model.locate import locate
from model.weights import load_weights
from tests.fixtures.make_release import RUNS, STOP_AT, results, train

FIXTURES = Path(__file__).parent / "fixtures"
RELEASES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.json"))


def bits(checkpoint: Path) -> dict[str, bytes]:
    """Every weight and moment of a checkpoint."""
    found = {}
    for path in checkpoint.rglob("*.safetensors"):
        kind = path.relative_to(checkpoint).parts[0]
        found |= {f"{kind} {name}": tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_a_release_goes_on_as_it_would_have(release, name, tmp_path):
    fixture = FIXTURES / release
    for part in ("corpus", "plans", f"runs/{name}"):
        shutil.copytree(fixture / part, tmp_path / part)
    for part in ("corpus", "plans"):
        shutil.copytree(fixture / part, tmp_path / "anew" / part)
    train(name, tmp_path / "anew")
    before = Path("runs", name, "checkpoints", f"step-{STOP_AT:08d}")
    of_release, of_today = bits(fixture / before), bits(tmp_path / "anew" / before)
    assert len(of_release) > 30 and of_release.keys() == of_today.keys()
    train(name, tmp_path)
    document = json.loads((fixture / "expected.json").read_text(encoding="utf-8"))
    expected, found = document["runs"][name], results(tmp_path / "runs" / name)
    assert found.keys() == expected.keys() and len(found) == 4
    if of_release == of_today:
        assert found == expected
    for key, values in expected.items():
        # bf16 rounds weights and activations to 8 bits, fp32 to 24.
        assert found[key] == pytest.approx(values, rel=1e-2 if name == "tied" else 1e-5), key
    events = [json.loads(line) for line in (tmp_path / "runs" / name / "events.jsonl").read_text().splitlines()]
    resumed = [event for event in events if event["event"] == "resume"]
    assert [event["step"] for event in resumed] == [STOP_AT], "the run began again"


@pytest.mark.parametrize("release", RELEASES)
def test_a_corpus_of_a_release_is_whole(release, capsys):
    assert data_pipeline(["verify", str(FIXTURES / release / "corpus")]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_of_a_release_loads(release, name):
    found = dict(load_weights(locate(FIXTURES / release / "runs" / name).weights))
    assert "embedding.weight" in found and all(tensor.isfinite().all() for tensor in found.values())
