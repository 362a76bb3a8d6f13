"""The state that lanes carry from step to step (train.parallel.carried_state), in a checkpoint.

`carried/lanes-RRRRR.safetensors` has the lanes of rank R: each tensor of the state under its place in it, such as
`blocks.3.cell.C`, with the lanes as its first axis; the metadata say the `first_lane` of them and the `format_version`.
Without such a file all lanes are empty. A rank reads the lanes that it has now, whoever had them before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.marker import MarkerError, read_marker
from train.checkpoints.layout import CheckpointError, refuse_other_format

FOLDER = "carried"
_FORMAT_VERSION = 1


def save_lanes(folder: Path, rank: int, first_lane: int, tensors: Mapping[str, Tensor]) -> Path:
    """Write the lanes of one rank into a checkpoint; returns the file's path."""
    path = folder / FOLDER / f"lanes-{rank:05d}.safetensors"
    metadata = {"format_version": str(_FORMAT_VERSION), "first_lane": str(first_lane)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


class LanesReader:
    """Reads the lanes of any rank from the files that a checkpoint's marker lists.

    Raises CheckpointError for a file that cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder / FOLDER
        # (first lane, file) of each.
        self._files: list[tuple[int, Path]] = []
        try:
            listed = read_marker(folder).files_in(FOLDER)
        except MarkerError as error:
            raise CheckpointError(str(error)) from None
        for name in listed:
            path = folder / name
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata() or {}
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
            refuse_other_format(path, metadata.get("format_version"), _FORMAT_VERSION)
            self._files.append((int(metadata["first_lane"]), path))

    @property
    def is_empty(self) -> bool:
        """Whether no lane carries anything."""
        return not self._files

    def read(self, name: str, lanes: range) -> Tensor:
        """Tensor `name` of the state for `lanes`: [lanes, ...], on the host."""
        parts: dict[int, Tensor] = {}
        for first, path in self._files:
            with safe_open(path, framework="pt") as file:
                if name not in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    raise CheckpointError(f"{path} has no {name}, which the model carries")
                stored = file.get_slice(name)
                begin, end = max(lanes.start, first), min(lanes.stop, first + stored.get_shape()[0])
                if begin < end:
                    parts[begin] = stored[begin - first : end - first]
        found = [parts[begin] for begin in sorted(parts)]
        if sum(len(part) for part in found) != len(lanes):
            raise CheckpointError(
                f"{self.folder} does not hold each of the lanes {lanes.start} to {lanes.stop - 1} once"
            )
        return torch.cat(found)
