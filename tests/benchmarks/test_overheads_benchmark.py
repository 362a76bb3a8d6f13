"""The benchmark of watching and saving runs from end to end on a CPU."""

import subprocess
import sys

import pytest

from benchmarks.overheads import EVERY, judged
from tests.runs import PATIENCE, ROOT, TINY_RUN, environment


def test_what_statistics_take_is_charged_at_the_intervals_of_a_run():
    usual = {step: 1.0 for step in range(1, 4 * EVERY + 1)}
    watched = {step: 1.01 for step in usual} | {EVERY: 3.01, 2 * EVERY: 9.01, 3 * EVERY: 3.01, 4 * EVERY: 9.01}
    found = judged(usual, watched)
    # 2 more every 100 steps, 6 more every 1,000.
    assert found.share == pytest.approx(0.01 + 0.02 + 0.006)


@pytest.mark.slow
@pytest.mark.long
def test_runs_and_their_saves_are_in_the_table(small_corpus, tmp_path):
    command = [sys.executable, "-m", "benchmarks.overheads", str(small_corpus), "--rounds", "1", "--save-every", "30"]
    settings = [text for text in TINY_RUN if not text.startswith(("corpus", "evaluation", "logging", "checkpoint"))]
    command += ["--steps", str(4 * EVERY + 2), "--output", str(tmp_path / "table.md"), *settings]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in (tmp_path / "table.md").read_text().splitlines() if "| 1 |" in line]
    watching, saving = rows
    assert len(watching) == 6 and all(float(cell) > 0 for cell in watching[1:5])
    assert len(saving) == 5 and float(saving[3]) > 0, saving
