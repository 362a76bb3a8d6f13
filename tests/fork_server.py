"""Runs of `python -m train` and of scripts, each a process that begins as a copy of one that has imported it all.

To import torch and DeepSpeed takes 6 seconds of CPU time, most runs of the tests take one. What follows the imports is
that of any run: its own process or processes, environment, standard streams, process group over gloo, exit code. Tests
of the command itself, of signals and of torchrun start their processes anew.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# From the failure of one process of a run to the end of the others, which may wait for it.
TERM_SECONDS = 30.0


class ForkServer:
    """The process to copy, started at the first run, and for as long as this process lives."""

    def __init__(self, environment: dict[str, str], folder: Path):
        self._environment = environment
        command = [sys.executable, "-m", "tests.fork_server"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=environment, cwd=folder, text=True, **pipes)

    @property
    def pid(self) -> int:
        """Its children are the processes of the run that goes on."""
        return self._process.pid

    def suits(self, environment: dict[str, str]) -> bool:
        """Whether a process with this environment would have been imported the same."""
        return environment == self._environment

    def run(
        self, command: list[str], processes: int, timeout: float, variables: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """As subprocess.run of a Python file and its arguments, under torchrun where there are several processes.

        `variables` of the environment are the run's alone; none of them may matter to what was imported already.
        """
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            # The server opens what this process has open: by its descriptors in /proc.
            outputs = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (stdout, stderr)]
            self._process.stdin.write(json.dumps([command, processes, *outputs, variables]) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], timeout)[0]:
                self._process.kill()
                raise subprocess.TimeoutExpired(command, timeout)
            answer = self._process.stdout.readline()
            assert answer, "the process that runs are copied from has died"
            texts = []
            for file in (stdout, stderr):
                file.seek(0)
                texts.append(file.read())
        return subprocess.CompletedProcess(command, json.loads(answer), *texts)


def _serve() -> None:
    # Where runs write what the imports print here.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # The engine first: it tells DeepSpeed its accelerator. Last what torch's optimizers import in passing.
    for name in ("train.parallel.zero", "train.run", "torch._dynamo"):
        importlib.import_module(name)
    for line in sys.stdin:
        threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        # Of Arrow's allocator, which looks after its locks in a copy.
        others = [name for name in threads if name != "jemalloc_bg_thd"]
        assert len(others) == 1, f"a copy would lack the threads beside this one, and know nothing of it: {others}"
        print(_run(*json.loads(line)), file=answers, flush=True)


def _run(command: list[str], processes: int, stdout: str, stderr: str, variables: dict[str, str]) -> int:
    """Exit code of a run: of its one process, or 1 where one of several failed, as torchrun has it."""
    from tests.runs import reserved_port

    if processes == 1:
        _, status = os.waitpid(_start(command, variables, stdout, stderr), 0)
        return os.waitstatus_to_exitcode(status)
    with reserved_port() as port:
        world = variables | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        ranks = {_start(command, world | place, stdout, stderr) for place in places}
        deadline = None
        while ranks:
            ended, status = os.waitpid(-1, os.WNOHANG)
            ranks.discard(ended)
            if ended and status and deadline is None:
                # As torchrun: the others are asked to end, and made to where they do not.
                deadline = time.monotonic() + TERM_SECONDS
                _signal(ranks, signal.SIGTERM)
            elif deadline is not None and time.monotonic() > deadline:
                _signal(ranks, signal.SIGKILL)
            if not ended:
                time.sleep(0.01)
    return int(deadline is not None)


def _signal(processes: set[int], number: signal.Signals) -> None:
    for process in processes:
        os.kill(process, number)


def _start(command: list[str], variables: dict[str, str], stdout: str, stderr: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code: Any = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in ((1, stdout), (2, stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
        os.environ.update(variables)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001 - as the interpreter does with what nobody catches
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    _serve()
