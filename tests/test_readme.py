"""Every command that the README shows to a newcomer is run, in a copy of the tree."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.runs import PATIENCE, ROOT, environment

# Enough to walk every stage of the demo; a model of so few steps does not beat the n-grams, and the demo says so.
SHORT_DEMO = ["training.total_steps=4", "checkpoint.interval=2", "evaluation.interval=0", "logging.interval=2"]


def readme_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files that git tracks or would track, without those that runs leave behind."""
    target = tmp_path_factory.mktemp("checkout") / "xlstm-pretrain"
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listing.stdout.splitlines() if listing.returncode == 0 else []
    if not names:
        pytest.skip("not a git checkout")
    for name in names:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / ".venv").symlink_to(ROOT / ".venv", target_is_directory=True)
    return target


def test_the_readme_begins_with_the_two_commands():
    assert readme_commands()[:2] == ["make demo", "make test"]


def run(command, checkout):
    variables = {**environment(), "PYTHONPATH": str(checkout)}
    return subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=PATIENCE)


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


@pytest.mark.slow
def test_the_other_commands_work_in_their_order(checkout):
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("the README's commands use .venv, which `make` creates")
    commands = readme_commands()[2:]
    assert len(commands) >= 7
    for command in commands:
        done = run(shlex.split(command), checkout)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "6,865,424,896 parameters in 483 tensors" in done.stdout
