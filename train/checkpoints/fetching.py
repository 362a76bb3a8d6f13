"""Brings a checkpoint from the mirror of any run into a folder that commands take as a run's: to branch from, or to
look at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from conf.problems import ConfigError
from data_pipeline.corpus.files import sync
from model.locate import step_folder
from model.marker import read_marker
from train.checkpoints.layout import MARKER, CheckpointError, begin_staging, put_in_place
from train.checkpoints.mirror_store import MirrorStore


def fetch(store: MirrorStore, step: int | None, output: Path) -> Path:
    """Copy a checkpoint from the mirror, verified; returns its folder, `output`/checkpoints/step-XXXXXXXX.

    `step`: completed steps; None: the newest.

    Raises:
        ConfigError: there is none of that step, or `output` has it already.
        CheckpointError: it is not as its marker says.
        Exception: whatever the file system says, which `store.shown` tells without a password.
    """
    marked = [number for number, is_marked in store.steps().items() if is_marked]
    if not marked:
        raise ConfigError([f"{store.url} has no complete checkpoint"])
    if step is not None and step not in marked:
        raise ConfigError(
            [f"{store.url} has no complete checkpoint of {step} steps, but of {', '.join(map(str, marked))}"]
        )
    chosen = marked[-1] if step is None else step
    folder = step_folder(output / "checkpoints", chosen)
    if os.path.lexists(folder):
        raise ConfigError([f"{folder} is there already; delete it, or choose another --output"])
    staged = begin_staging(folder, f"fetch-{os.getpid()}", ("weights",))
    try:
        store.download(chosen, MARKER, staged / MARKER)
        download_files(store, chosen, staged, read_marker(staged).files)
        for path in (*(path for path in staged.rglob("*") if path.is_dir()), staged):
            sync(path)
        put_in_place(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder


def download_files(store: MirrorStore, step: int, staged: Path, names: Iterable[str]) -> None:
    """Copy files of a checkpoint whose marker lies in `staged`. Raises CheckpointError for one that is not as it says,
    and whatever the file system does."""
    files = read_marker(staged).files
    for name in names:
        if store.download(step, name, staged / name) != files[name]["xxh3_128"]:
            raise CheckpointError(f"{name} was altered: its checksum is not that of {MARKER}")
