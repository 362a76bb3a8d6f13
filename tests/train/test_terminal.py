"""A run on a terminal of 80 columns that goes away: what is shown, what goes on, and how a request to stop is met."""

import fcntl
import os
import re
import shlex
import signal
import struct
import subprocess
import termios
import threading
import time

import pytest

from model.__main__ import main as generate_text
from tests.runs import PATIENCE, ROOT, TINY_RUN, environment, train_command
from train.callbacks.metrics_file import read_metrics
from train.evaluate.__main__ import main as evaluate_model
from train.report import main as draw_report
from train.run_directory import read_events

COLUMNS = 80


class Terminal:
    """A pseudo-terminal, read by a thread."""

    def __init__(self):
        self._reader, self.descriptor = os.openpty()
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        self.shown = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        try:
            while data := os.read(self._reader, 65536):
                self.shown += data
        except OSError:
            return

    def vanish(self):
        os.close(self._reader)


def wait_until(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def lost(small_corpus, tmp_path_factory):
    """What a terminal showed of a run before it vanished, and the run's folder, as the run left it when it was asked
    to stop some steps later."""
    root = tmp_path_factory.mktemp("terminal")
    base = ["name=run", f"run_root={root}", f"corpus.directory={small_corpus}", *TINY_RUN]
    overrides = [*base, "logging.progress=true", "training.total_steps=100000"]
    terminal = Terminal()
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(
        train_command(overrides),
        env=environment(),
        cwd=ROOT,
        stdout=terminal.descriptor,
        stderr=terminal.descriptor,
        start_new_session=True,
    )
    signal.signal(signal.SIGHUP, before)
    os.close(terminal.descriptor)

    def steps():
        return read_metrics(root / "run")[-1:] if (root / "run" / "metrics.jsonl").exists() else []

    wait_until(lambda: steps() and steps()[0]["step"] >= 8, process)
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: any(e["event"] == "output_lost" for e in read_events(root / "run")), process)
    terminal.vanish()
    seen = steps()[0]["step"]
    wait_until(lambda: steps()[0]["step"] >= seen + 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 0
    return terminal.shown.decode(), root / "run"


@pytest.mark.slow
def test_losses_leave_lines_above_a_bar_that_keeps_speed_and_time_left_at_80_columns(lost):
    shown, _ = lost
    assert re.search(r"^.*step 3/100000  loss \d\.\d{4}  [\d,]+ tokens/s  .* left\r$", shown, re.M)
    bars = [part for part in re.split(r"[\r\n]", shown) if "|" in part and "step" in part]
    full = [bar for bar in bars if "tokens/s" in bar]
    assert full
    for bar in full:
        assert re.search(r"%\|.+\| step \d+/100000  (\?|\d[\d:]*) left, [\d,]+ tokens/s, loss \d\.\d{4}$", bar), bar
        assert len(bar) <= COLUMNS


@pytest.mark.slow
def test_the_start_says_where_the_run_lies_and_only_the_plan_is_shown(lost):
    shown, run = lost
    lines = shown.splitlines()
    assert lines[0] == f"run        {run}, with a log of each process in logs/"
    bar = next(number for number, line in enumerate(lines) if "step" in line and "%|" in line)
    plan = [line for line in lines[:bar] if line.strip()]
    # A label, or the continuation of a line; the bar begins behind them.
    assert [line for line in plan if not re.match(r"(?=.{11}\S)[a-z]* +\S", line)] == []
    assert {"run", "model", "memory", "checkpoint", "data"} <= {line.split()[0] for line in plan}


@pytest.mark.slow
def test_a_run_goes_on_without_its_terminal_and_says_so(lost):
    _, run = lost
    reasons = [(e["stream"], e["reason"]) for e in read_events(run) if e["event"] == "output_lost"]
    assert ("stderr", "SIGHUP") in reasons and len(reasons) <= 2
    log = (run / "logs" / "rank-00000.log").read_text()
    assert re.search(r"^step \d+/100000  loss ", log, re.M)
    # The bar has no place there, but for what was being drawn.
    assert log.count("%|") <= 1
    stop = read_events(run)[-1]
    assert (stop["event"], stop["reason"]) == ("stop", "SIGTERM")
    assert (run / "checkpoints" / f"step-{stop['step']:08d}" / "complete.json").exists()


@pytest.mark.slow
def test_a_request_to_stop_is_acknowledged_and_noted(lost):
    _, run = lost
    events = read_events(run)
    (request,) = [e for e in events if e["event"] == "stop_request"]
    assert request["reason"] == "SIGTERM" and events[-1]["step"] - request["step"] in (0, 1, 2)
    log = (run / "logs" / "rank-00000.log").read_text()
    assert (
        f"SIGTERM: the run finishes the step under way (step {request['step'] + 1} of 100,000), saves a checkpoint and "
        "ends. Asking again changes nothing." in log
    )
    assert f"The run lies in {run}. Next:" in log


@pytest.mark.slow
def test_what_is_to_be_typed_next_works_as_it_stands(lost, capsys):
    _, run = lost
    _, resume, *commands = (run / "logs" / "rank-00000.log").read_text().splitlines()[-5:]
    _, *words = shlex.split(resume)
    assert words[:3] == ["-m", "train", "name=run"] and words[-1] == "training.total_steps=100000"
    generate, evaluate, report = (shlex.split(line) for line in commands)
    assert subprocess.run([generate[0], "-c", ""], cwd=ROOT).returncode == 0
    assert generate[1:4] == ["-m", "model", "generate"] and report[1:3] == ["-m", "train.report"]
    assert generate_text([*generate[3:], "max_new_tokens=2"]) == 0
    assert capsys.readouterr().out.startswith("The ")
    assert evaluate[1:3] == ["-m", "train.evaluate"] and evaluate_model(evaluate[3:]) == 0
    assert "validation" in capsys.readouterr().out
    assert draw_report(report[3:]) == 0 and (run / "report.png").exists()
