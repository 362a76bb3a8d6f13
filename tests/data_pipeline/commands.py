"""The `prepare` command as processes of their own, and what they leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.preparing.workers import WorkFolder
from tests.runs import PATIENCE, ROOT, environment


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(raw: Path, out: Path, *more: str, **variables: str) -> subprocess.Popen:
    """The command, with a unit an input file."""
    settings = ["data=slimpajama", f"source={raw}", f"output={out}", "tokenizer.vocab_size=400", *more]
    settings += ["tokenizer.sample_bytes=200000", "unit_bytes=1", "shard_bytes=4000"]
    command = [sys.executable, "-m", "data_pipeline", "prepare", *settings]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**environment(), **variables}, **pipes)


@contextmanager
def never_finished(out: Path, unit: int) -> Iterator[None]:
    """Meanwhile no command can finish the corpus `out`: another machine seems to hold `unit`, so that all wait for it.

    A test that kills a command then kills it before its end, however late the test comes to it.
    """
    claims = WorkFolder(out).claims
    claims.mkdir(parents=True, exist_ok=True)
    claim = claims / f"{unit:06d}.0"
    claim.write_text(json.dumps({"machine": ["elsewhere"], "pid": 1, "started": 1.0}))
    yield
    claim.unlink()


def finish(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return out
