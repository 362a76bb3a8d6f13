"""Any file of a run, a checkpoint, a corpus or a Hugging Face directory may hold anything, or be another kind of thing:
every command says so, or does without; no traceback, no process that hangs, nothing written elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT, environment

# Those of `make test`; `make test-fuzz` has all others.
FIXED = 100
ALL = 2000
AT_ONCE = 190


def run_cases(folder: Path, first: int, last: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.fuzz.driver", str(folder), str(first), str(last)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(outcomes: list[dict[str, Any]]) -> None:
    faults = [
        f"case {found['number']}: {found['file']} ({found['mutation']}), {' '.join(found['command'])}: "
        f"{'; '.join(found['faults'])}\n{found['said']}"
        for found in outcomes
        if found["faults"]
    ]
    assert not faults, "\n\n".join(faults)


@pytest.mark.slow
def test_commands_on_damaged_files_end_with_a_message_or_do_without(tmp_path):
    outcomes = run_cases(tmp_path, 0, FIXED)
    check(outcomes)
    assert len(outcomes) == FIXED
    # Of every kind: what is damaged, how, and what is run; some is refused and some is not.
    assert len({found["file"].split("/")[0] for found in outcomes}) == 7
    assert len({found["mutation"].partition(",")[0] for found in outcomes}) > 12
    assert len({found["command"][0] for found in outcomes}) == 6
    assert {found["code"] for found in outcomes} == {0, 1, 2}


@pytest.mark.fuzz
@pytest.mark.parametrize("first", range(FIXED, ALL, AT_ONCE))
def test_further_cases(first, tmp_path):
    check(run_cases(tmp_path, first, min(first + AT_ONCE, ALL)))
