"""Folders of weights made checkpoints of, for tests that need no run."""

from __future__ import annotations

from pathlib import Path

from train.checkpoints.layout import describe_file, mark_complete


def mark_checkpoint(folder: Path) -> None:
    """Write the marker of a checkpoint that consists of all files in `folder`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    mark_complete(folder, "0123456789ab", {path.relative_to(folder).as_posix(): describe_file(path) for path in files})
