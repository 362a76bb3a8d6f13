"""The README's two commands (the others: test_documented_commands.py), in a copy of the tree."""

import subprocess
import sys

import pytest

from tests.docs.documentation import blocks
from tests.runs import PATIENCE, ROOT, environment

# Enough to walk every stage of the demo; a model of so few steps does not beat the n-grams, and the demo says so.
SHORT_DEMO = ["training.total_steps=4", "checkpoint.interval=2", "evaluation.interval=0", "logging.interval=2"]


def run(command, checkout):
    variables = {**environment(), "PYTHONPATH": str(checkout)}
    return subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=PATIENCE)


def test_the_readme_is_short_and_begins_with_the_two_commands():
    assert blocks(ROOT / "README.md")[0].text.splitlines() == ["make demo", "make test"]
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


def test_make_test_runs_pytest(checkout):
    done = run(["make", "--dry-run", "test"], checkout)
    assert done.returncode == 0 and "-m pytest" in done.stdout, done.stderr


@pytest.mark.slow
def test_make_demo_walks_every_stage_and_is_quick_the_second_time(checkout):
    plan = run(["make", "--dry-run", "demo"], checkout)
    assert "-m launch demo" in plan.stdout, plan.stderr
    # What the Makefile calls, with a shorter run.
    command = [sys.executable, "-m", "launch", "demo", *SHORT_DEMO]
    first = run(command, checkout)
    assert "does not beat both n-gram models" in first.stderr, first.stderr
    assert first.returncode == 1
    for name in ("unigram", "bigram", "this xLSTM", "report.png"):
        assert name in first.stdout
    report = checkout / "runs" / "demo" / "report.png"
    assert report.read_bytes().startswith(b"\x89PNG")
    second = run(command, checkout)
    assert "is complete" in second.stderr
    assert second.stdout.splitlines()[-5:] == first.stdout.splitlines()[-5:]
