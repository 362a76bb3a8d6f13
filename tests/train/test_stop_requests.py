"""Requests to stop are answered at once: while an operation runs for long, and before the first step."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from launch.processes import TrainingProcesses, _answers
from tests.runs import PATIENCE, ROOT, environment
from train.stop_requests import SIGNALS, OutsideTraining, SignalListener


def _signal_soon(number, seconds=0.1):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.start()
    return timer


def test_an_answer_does_not_wait_for_the_operation_under_way():
    answered, noted = [], []
    before = signal.getsignal(signal.SIGUSR1)
    with SignalListener(
        (signal.SIGUSR1,), lambda n: answered.append(time.monotonic()), lambda n: noted.append(time.monotonic())
    ):
        _signal_soon(signal.SIGUSR1)
        # Python's own handlers run when it returns.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
        end = time.monotonic()
    assert answered and noted
    assert answered[0] < end - 0.2 < noted[0]
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_listener_inside_another_takes_its_place_until_it_is_left():
    outer, inner = [], []

    def send():
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + PATIENCE
        while not (outer or inner) and time.monotonic() < deadline:
            time.sleep(0.001)
        found = [*outer], [*inner]
        outer.clear(), inner.clear()
        return found

    with SignalListener((signal.SIGUSR1,), outer.append):
        with SignalListener((signal.SIGUSR1,), inner.append):
            assert send() == ([], [signal.SIGUSR1])
        assert send() == ([signal.SIGUSR1], [])


def test_a_copy_of_the_process_does_not_tell_its_parent_of_its_own_signals():
    answered = []
    with SignalListener((signal.SIGUSR1,), answered.append):
        pid = os.fork()
        if not pid:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        time.sleep(0.05)
    assert answered == []


def test_processes_that_have_met_keep_a_request_for_the_first_step(capsys):
    outside = OutsideTraining()
    outside.processes_met(2)
    outside.answer(signal.SIGINT, None)
    assert "SIGINT: the run's processes are starting together; the run ends after its first step" in (
        capsys.readouterr().err
    )
    assert outside.begin_training() == ["SIGINT"]
    assert outside.begin_training() == []


TRAIN = ["name=x", "corpus.directory=nowhere", "training.total_steps=3"]


@pytest.mark.parametrize("module", ["train", "launch local"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_in_the_first_seconds_is_one_line_and_exit_code_0(module, number):
    command = [sys.executable, "-m", *module.split(), *TRAIN]
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not _answers(process):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    _, shown = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert shown == f"train: stopped by {number.name} before the first step; the same command goes on.\n"


def test_launched_processes_that_cannot_answer_yet_are_ended(capfd):
    timer = _signal_soon(signal.SIGINT, 0.3)
    started = time.monotonic()
    command = [sys.executable, "-c", "import time; time.sleep(100)"]
    assert TrainingProcesses(1).run(command, environment()) == 0
    assert time.monotonic() - started < 50
    timer.join()
    assert capfd.readouterr().err == "launch: stopped by SIGINT before training began; the same command goes on.\n"


def test_launched_processes_get_the_signal_once_they_can_answer():
    code = (
        "import signal, sys, time\n"
        f"for n in {[int(number) for number in SIGNALS]}: signal.signal(n, lambda n, f: sys.exit(n))\n"
        "time.sleep(100)"
    )
    processes = TrainingProcesses(1)

    def send():
        while processes._started is None or not _answers(processes._started):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=send)
    thread.start()
    assert processes.run([sys.executable, "-c", code], environment()) == signal.SIGUSR1
    thread.join()
