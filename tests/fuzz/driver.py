"""Runs cases of the fuzzer, each command in a copy of this process: `python -m tests.fuzz.driver FOLDER FIRST LAST`.

A case is a number. It gives the file, what becomes of it and the command, so that a fault is found again by its number:
`python -m tests.fuzz.driver FOLDER 17 18` makes everything in FOLDER, runs case 17 and prints what came of it as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import subjects
from tests.fuzz.mutations import choose

# A command takes a second or two.
LIMIT_SECONDS = 60.0
# A command may take so much more than this process has, as on a small machine.
MEMORY = 4 * 2**30
LARGEST_FILE = 256 * 2**20
# What a terminal or the system offers to everyone.
ANYWHERE = ("/dev/null", "/dev/shm/", "/proc/self/")


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    number: int
    file: str
    mutation: str
    command: list[str]
    code: int
    # What is wrong with how the command behaved; none: it worked, or said what is wrong.
    faults: list[str]
    said: str


# What commands import as they go.
IMPORTED = (
    "PIL.PngImagePlugin",
    "conf.composition",
    "hydra._internal.core_plugins",
    "matplotlib.backends.backend_agg",
    "pandas",
    "tokenizers",
    "torch._dynamo",
    "torch._inductor",
    "train.report",
    "transformers.models.llama.modeling_llama",
    "transformers.models.xlstm.modeling_xlstm",
)


def _commands() -> dict[str, Callable[[list[str]], int]]:
    import torch

    import train.run
    from data_pipeline.__main__ import main as data_pipeline
    from data_pipeline.preparing import claims
    from model.__main__ import main as model
    from tests.train.plain_engine import PlainEngine
    from train.__main__ import main as train_main
    from train.checkpoint import main as checkpoint
    from train.evaluate.__main__ import main as evaluate
    from train.parallel.engine import make_engine
    from train.report import main as report

    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # Whose holder a damaged claim does not tell is waited for.
    claims.LEASE_SECONDS = 1.0

    def engine(config: Any, plan: Any, mesh: Any) -> Any:
        # DeepSpeed takes a second to begin, and reads no file.
        is_plain = config.precision.compute_dtype is torch.float32
        return (PlainEngine if is_plain else make_engine)(config, plan, mesh)

    train.run.train = functools.partial(train.run.train, factory=engine)
    return {
        "train": train_main,
        "model": model,
        "data_pipeline": data_pipeline,
        "checkpoint": checkpoint,
        "evaluate": evaluate,
        "report": report,
    }


class Driver:
    """`root`: an empty folder for what is damaged and for the cases."""

    def __init__(self, root: Path):
        self.root = root
        self.base = root / "base"
        self.outside = root / "outside"
        self.commands = _commands()

    def make(self) -> None:
        """What is damaged."""
        texts = [self.base / folder for folder in ("text", "more")]
        for folder in (*texts, self.outside):
            folder.mkdir(parents=True)
        random = Random(0)
        words = ["".join(random.choices("abcdefghij", k=random.randint(2, 6))) for _ in range(100)]
        for number in range(12):
            text = " ".join(random.choices(words, k=400))
            (texts[number % 4 == 0] / f"{number:02d}.txt").write_text(text)
        for command in subjects.MAKE:
            code, said = self.run(command, self.base)[:2]
            assert code == 0, f"{command}: {said}"
        self._interrupt_prepare()
        self._pairs = subjects.pairs(self.base)

    def _interrupt_prepare(self) -> None:
        """A preparation that is killed with some of its units done."""
        renames = 0

        def kill(event: str, arguments: tuple) -> None:
            nonlocal renames
            renames += event == "os.rename" and "unfinished" in os.fspath(arguments[1])
            if renames == 8:
                os._exit(9)

        command = ["data_pipeline", *subjects.PREPARE, "output=unfinished"]
        code, said = self.run(command, self.base, kill)[:2]
        assert code == 9, said

    def case(self, number: int) -> Outcome:
        file, command = self._pairs[number % len(self._pairs)]
        random = Random(number)
        folder, outside = self.root / "case", self.outside / "elsewhere"
        shutil.copytree(self.base, folder)
        outside.write_text("nobody writes here")
        path = folder / file
        name, mutate = choose(path, random)
        is_signed = random.random() < 0.7
        with contextlib.suppress(json.JSONDecodeError):
            mutate(path, random, outside)
            if is_signed:
                with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError, RecursionError):
                    subjects.sign(folder, file)
        before = self._outside()
        code, said, wrote = self.run(command, folder)
        faults = self._faults(code, said, wrote)
        if self._outside() != before:
            faults.append("a file elsewhere was written")
        for path in folder.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder)
        mutation = f"{name}{', signed' if is_signed else ''}"
        return Outcome(number, file, mutation, command, code, faults, said)

    def _outside(self) -> dict[str, tuple[int, bytes]]:
        return {path.name: (path.stat().st_mode, path.read_bytes()) for path in self.outside.iterdir()}

    @staticmethod
    def _faults(code: int, said: str, wrote: list[str]) -> list[str]:
        faults = [f"wrote {line}" for line in wrote]
        if code not in (0, 1, 2):
            faults.append(f"ended with {code}")
        if "Traceback (most recent call last)" in said or "Exception ignored" in said:
            faults.append("a traceback")
        if code in (1, 2) and not said.strip():
            faults.append("no word")
        return faults

    def run(
        self, command: Sequence[str], folder: Path, hook: Callable[[str, tuple], None] | None = None
    ) -> tuple[int, str, list[str]]:
        """Exit code of a command in `folder` (-9: it hung), what it said, what it wrote outside of `folder`."""
        output, written = self.root / "output", self.root / "written"
        for path in (output, written):
            path.write_text("")
        pid = os.fork()
        if not pid:
            self._be(list(command), folder, output, written, hook)
        code = _wait(pid)
        return code, output.read_text(errors="replace"), written.read_text().splitlines()

    def _be(
        self, command: list[str], folder: Path, output: Path, written: Path, hook: Callable[[str, tuple], None] | None
    ) -> None:
        code = 70
        try:
            os.setpgid(0, 0)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number in (1, 2):
                os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), number)
            os.chdir(folder)
            _bind()
            watch = _Watch(folder, os.open(written, os.O_WRONLY | os.O_APPEND))
            sys.addaudithook(hook or watch.see)
            code = self.commands[command[0]](command[1:])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:  # noqa: BLE001 - as the interpreter does with what nobody catches
            traceback.print_exc()
            code = 1
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


def _wait(pid: int) -> int:
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            # It says where it is.
            os.kill(pid, signal.SIGABRT)
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            status = signal.SIGKILL
            break
        time.sleep(0.005)
    # What it may have started.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def _bind() -> None:
    """As root is, nobody may read what its permissions forbid; no number leads to all the memory or disk there is."""
    import faulthandler

    from tests.privileges import permissions_hold

    faulthandler.enable()
    permissions_hold().__enter__()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class _Watch:
    """Notes what Python code writes to outside of a folder."""

    # Event -> the places of its arguments that name what is changed, and of their folders' descriptors.
    CHANGES = {
        "os.rename": ((0, 2), (1, 3)),
        "os.remove": ((0, 1),),
        "os.mkdir": ((0, 2),),
        "os.rmdir": ((0, 1),),
        "os.link": ((1, 3),),
        "os.symlink": ((1, 2),),
        "os.truncate": ((0, None),),
        "os.chmod": ((0, 2),),
        "os.utime": ((0, 3),),
    }

    def __init__(self, folder: Path, notes: int):
        self.folder = os.path.realpath(folder)
        self.notes = notes

    def see(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self._check(event, os.path.realpath(os.fsdecode(path)))
        elif event in self.CHANGES:
            for place, descriptor in self.CHANGES[event]:
                path = arguments[place]
                if isinstance(path, (str, bytes, os.PathLike)):
                    at = -1 if descriptor is None else arguments[descriptor]
                    self._check(event, _place(os.fsdecode(path), at))

    def _check(self, event: str, path: str) -> None:
        if path != self.folder and not path.startswith((f"{self.folder}/", *ANYWHERE)):
            os.write(self.notes, f"{event} {path}\n".encode())


def _place(path: str, descriptor: int) -> str:
    """Where an entry of a folder lies; what it leads to, where it is a link, is not meant."""
    if descriptor is not None and descriptor >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
    path = os.path.abspath(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def main(arguments: list[str]) -> None:
    root, first, last = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    # Where libraries keep caches and configurations of their own.
    for variable, name in (("HOME", "home"), ("MPLCONFIGDIR", "home"), ("TMPDIR", "temporary")):
        (root / name).mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(root / name)
    sys.dont_write_bytecode = True
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    driver = Driver(root)
    driver.make()
    for number in range(first, last):
        print(json.dumps(asdict(driver.case(number))), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
