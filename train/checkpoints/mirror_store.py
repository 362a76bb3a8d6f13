"""The checkpoints of a run at a second place, as they lie there: `<mirror>/<name>/checkpoints/step-XXXXXXXX/`.

A path or a URL of any file system that fsspec opens. The marker is written last, and taken away first: a copy that was
cut short has none, and counts as little as a save that was. Where the place is a path, commands take it as a run's
directory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from fsspec.implementations.local import LocalFileSystem

from conf.passwords import without_passwords
from data_pipeline.corpus.file_systems import open_folder, persistently, shown
from model.locate import step_folder
from model.marker import COMPLETE, read_marker
from train.checkpoints.layout import KEPT, CheckpointError

# Of a file that is in memory at once.
_CHUNK_BYTES = 8 * 2**20
_STEP = re.compile(r"step-(\d{8,})")


class MirrorStore:
    """What one run has there. Every method raises what the file system says; `shown` tells it without a password."""

    def __init__(self, place: str, name: str):
        """Raises ImportError or ValueError where no file system is known for `place`."""
        self._place, self._name = place, name
        # For messages.
        self.url = f"{without_passwords(place.rstrip('/'))}/{name}"
        # A server that does not answer now may answer later.
        with contextlib.suppress(OSError, RuntimeError, EOFError):
            self._folders  # noqa: B018

    @functools.cached_property
    def _folders(self) -> tuple[Any, str]:
        """The file system, and the folder of the run's checkpoints there."""
        system, root = open_folder(self._place)
        return system, f"{root}/{self._name}/checkpoints"

    @property
    def _system(self) -> Any:
        return self._folders[0]

    @property
    def _root(self) -> str:
        return self._folders[1]

    @property
    def local_root(self) -> str | None:
        """The real path of the folder of checkpoints, where it is known to be on a file system of this machine."""
        is_local = "_folders" in self.__dict__ and self._is_local
        return os.path.realpath(self._root) if is_local else None

    @property
    def _is_local(self) -> bool:
        return isinstance(self._system, LocalFileSystem)

    def shown(self, error: Exception) -> str:
        """What went wrong, for messages."""
        text = shown(error, self._place)
        return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"

    def steps(self) -> dict[int, bool]:
        """Step -> whether its checkpoint has a marker."""
        # Some file systems remember lists.
        self._system.invalidate_cache()
        try:
            names = persistently(lambda: self._system.ls(self._root, detail=False))
        except FileNotFoundError:
            return {}
        steps = [int(found[1]) for name in names if (found := _STEP.fullmatch(name.rstrip("/").rsplit("/", 1)[-1]))]
        return {step: self._has(step, COMPLETE) for step in sorted(steps)}

    def marker(self, step: int) -> bytes:
        """The marker of a checkpoint, as it is."""
        return self._read(self._path(step, COMPLETE))

    def is_kept(self, step: int) -> bool:
        """Whether a user keeps the checkpoint there for good."""
        return self._has(step, KEPT)

    def remove(self, step: int) -> None:
        """Delete what is there of a checkpoint, its marker first."""
        if self._has(step, COMPLETE):
            self._system.rm_file(self._path(step, COMPLETE))
        self._system.rm(self._folder(step), recursive=True)

    def upload(self, folder: Path, step: int, check: Callable[[], None]) -> None:
        """Copy a whole checkpoint there, in the place of what is there of the step.

        `check` is called before every piece; what it raises ends the copy. Raises CheckpointError for files that are
        not as the marker says, here or there.
        """
        marker = (folder / COMPLETE).read_bytes()
        files = read_marker(folder).files
        if self._system.exists(self._folder(step)):
            self.remove(step)
        for name, entry in sorted(files.items()):
            path = self._path(step, name)
            self._system.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            with (folder / name).open("rb") as source, self._system.open(path, "wb") as target:
                digest = _copy(source, target, check)
                self._flush(target)
            if digest != entry["xxh3_128"]:
                raise CheckpointError(f"{folder / name} was altered: its checksum is not that of {COMPLETE}")
            self._system.invalidate_cache()
            if (size := self._system.size(path)) != entry["bytes"]:
                raise CheckpointError(f"{self.url}: {name} of step {step} has {size} bytes, not {entry['bytes']}")
        check()
        # Under another name first: no reader sees half of it.
        partial = self._path(step, f"{COMPLETE}.partial")
        with self._system.open(partial, "wb") as target:
            target.write(marker)
            self._flush(target)
        self._system.mv(partial, self._path(step, COMPLETE))

    def download(self, step: int, name: str, target: Path) -> str:
        """Copy a file of a checkpoint to `target`; returns its checksum (xxh3-128, hex)."""

        def fetch() -> str:
            with self._system.open(self._path(step, name), "rb") as source, target.open("wb") as file:
                digest = _copy(source, file, lambda: None)
                file.flush()
                os.fsync(file.fileno())
            return digest

        target.parent.mkdir(parents=True, exist_ok=True)
        return persistently(fetch)

    def _folder(self, step: int) -> str:
        return f"{self._root}/{step_folder(Path(), step).name}"

    def _path(self, step: int, name: str) -> str:
        return f"{self._folder(step)}/{name}"

    def _has(self, step: int, name: str) -> bool:
        return bool(persistently(lambda: self._system.exists(self._path(step, name))))

    def _read(self, path: str) -> bytes:
        return bytes(persistently(lambda: self._system.cat_file(path)))

    def _flush(self, target: Any) -> None:
        """What is on a disk of ours survives a crash of the machine before the marker does."""
        if self._is_local:
            target.flush()
            os.fsync(target.fileno())


def _copy(source: Any, target: Any, check: Callable[[], None]) -> str:
    digest = xxhash.xxh3_128()
    while True:
        check()
        piece = source.read(_CHUNK_BYTES)
        if not piece:
            return digest.hexdigest()
        digest.update(piece)
        target.write(piece)
