"""The `prepare` command as processes of their own, and what they leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.runs import ROOT, environment


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(raw: Path, out: Path, *more: str, **variables: str) -> subprocess.Popen:
    """The command, with a unit an input file."""
    settings = ["data=slimpajama", f"source={raw}", f"output={out}", "tokenizer.vocab_size=400", *more]
    settings += ["tokenizer.sample_bytes=200000", "unit_bytes=1", "shard_bytes=4000"]
    command = [sys.executable, "-m", "data_pipeline", "prepare", *settings]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**environment(), **variables}, **pipes)


def finish(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out
