"""The training processes of one command on this machine, and the signals that go on to them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from conf.lasting_output import lasting_output
from train.stop_requests import SIGNALS, SignalListener, answered_signals, is_lost_terminal, tell

# Seconds that a signal waits for processes that are not yet able to answer it, once others are.
PATIENCE = 20.0


class TrainingProcesses:
    """Starts a command and passes on what asks it to stop: to the training processes themselves.

    torchrun, which is between where there are several, is passed by, and kept from what the terminal sends: it would
    end them after 30 seconds, checkpoint or not, and die of SIGUSR1 without ending them. SIGHUP is not passed on: what
    it says, that the terminal is gone, ends nothing.
    """

    def __init__(self, processes: int):
        self._processes = processes
        self._started: subprocess.Popen[bytes] | None = None
        self._is_started = threading.Event()
        self._ended_early = False

    def run(self, command: Sequence[str], environment: Mapping[str, str], log: Path | None = None) -> int:
        """Run `command` to its end and return its exit code; 0 where it was stopped before it could train.

        `log`: the file that gets what it prints, in the place of this process's output.
        """
        with (
            lasting_output() as output,
            SignalListener(
                answered_signals(),
                lambda number: output.lose_terminal(number.name) if is_lost_terminal(number) else self.pass_on(number),
            ),
        ):
            with contextlib.nullcontext() if log is None else log.open("ab") as printed:
                self._started = subprocess.Popen(
                    command, env=environment, process_group=0, stdout=printed, stderr=printed
                )
            self._is_started.set()
            code = self._started.wait()
        return 0 if self._ended_early else code

    def pass_on(self, number: signal.Signals) -> None:
        """Send a signal to every training process, as soon as all of them know what to do with it."""
        self._is_started.wait()
        assert self._started is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self._started.pid)
            deadline = time.monotonic() + PATIENCE
            while True:
                workers = started.children() if self._processes > 1 else [started]
                living = [one for one in workers if one.status() != psutil.STATUS_ZOMBIE]
                able = [one for one in living if _answers(one)]
                if not able and not (workers and not living):
                    self._end_at_once(started, number)
                    return
                if len(able) == len(living) or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            for one in living:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(number)

    def _end_at_once(self, started: psutil.Process, number: signal.Signals) -> None:
        """No process has come as far as to train, or to answer signals: what they would say is a traceback."""
        self._ended_early = True
        tell(f"launch: stopped by {number.name} before training began; the same command goes on.")
        # Stopped, it starts no more of them.
        started.suspend()
        for one in (*started.children(recursive=True), started):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _answers(process: psutil.Process) -> bool:
    """Whether a process has handlers for what may ask it to stop; where the system does not tell, it is taken to."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return not Path("/proc/self/status").exists()
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    return all(caught >> (number - 1) & 1 for number in SIGNALS)
