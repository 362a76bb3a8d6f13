"""The pages, and the commands that they show."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fork_server import ForkServer
from tests.runs import PATIENCE, ROOT, environment

# What a block of commands may need that a test does not have; anything else is a mistake in a page.
NEEDS = {"gpu", "cluster", "data", "account", "network", "time"}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


@dataclass(frozen=True)
class Block:
    """A block of shell commands in a page."""

    page: Path
    line: int
    # What it needs to be run; None: tests run it.
    needs: str | None
    text: str

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start()].count("\n") + 1, found["needs"], found["text"])
        for found in re.finditer(r"^```sh(?: needs=(?P<needs>\w+))?\n(?P<text>.*?)^```$", text, flags=re.M | re.S)
    ]


def python_blocks(page: Path) -> list[str]:
    """The pieces of Python in a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def inline_commands(page: Path) -> list[str]:
    """The commands in the sentences and tables of a page."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [text for text in re.findall(r"`([^`\n]+)`", prose) if _is_command(text)]


def help_commands() -> list[tuple[str, str]]:
    """(package, command) of every example in the help of a command line."""
    found = []
    for path in sorted(ROOT.glob("*/__main__.py")):
        text = path.read_text(encoding="utf-8").replace("\\\\\n", " ")
        found += [(path.parent.name, line.strip()) for line in text.splitlines() if line.startswith("  python -m ")]
    return found


def _is_command(text: str) -> bool:
    # A lone word, such as `make`, is a name.
    return re.match(r"(\w+=\S+ )*(\S*python\d? |make |pip |torchrun |wandb |sbatch |srun )", text) is not None


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, those inside of `bash -c '...'` too."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        yield words
        for word in words:
            if " -m " in word:
                yield from commands(word)


class Shell:
    """Runs blocks of commands in a copy of the tree. A command that has run once is not run again.

    The README's are typed into a new shell as they stand. Those of other pages that only start our modules, most of
    them, are copies of one process that has imported what all of them do: its imports take most of their time.
    """

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self._done: set[str] = set()
        self._environment = environment() | {"PYTHONPATH": str(checkout)}
        self._environment["PATH"] = f"{Path(sys.executable).parent}:{self._environment['PATH']}"
        self._server: ForkServer | None = None

    def run(self, block: Block) -> str:
        """What the commands of `block` print. Fails where one of them does."""
        lines = [" ".join(line.split()) for line in block.text.replace("\\\n", " ").splitlines()]
        plain = [line.replace(".venv/bin/python", "python") for line in lines]
        new = [line for line, same in zip(lines, plain, strict=True) if same not in self._done]
        self._done |= {line for line in plain if line.startswith("python -m ")}
        if new and all(re.fullmatch(r"python -m (model|train|launch)\b[^&|;<>$*\n]*", line) for line in new):
            return "".join(self._start_module(block, line) for line in new)
        # Python's lines mean something by how they are indented.
        text = block.text if "-c '" in block.text else "\n".join(new)
        return _checked(
            block,
            text,
            subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=self.checkout,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            ),
        )

    def _start_module(self, block: Block, line: str) -> str:
        module, *arguments = shlex.split(line)[2:]
        path = self.checkout / module.replace(".", "/")
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        if self._server is None:
            self._server = ForkServer(self._environment, self.checkout)
        return _checked(block, line, self._server.run([str(file), *arguments], 1, PATIENCE, {}))


def _checked(block: Block, text: str, done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{block}\n{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_python(pieces: list[str], folder: Path, packages: Path) -> str:
    """Run pieces of Python one after another in one process in `folder`; returns what they print. Fails where one does.

    `packages`: the folder in which our packages lie.
    """
    variables = environment() | {"PYTHONPATH": str(packages), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-c", "\n\n".join(pieces)],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
