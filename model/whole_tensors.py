"""Safetensors files of whole tensors, written one tensor at a time: memory holds one of them, however large a file is.

They lie in a folder as other programs name them: `model.safetensors`, or `model-NNNNN-of-NNNNN.safetensors` with an
index.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of one file, unless told otherwise.
SHARD_BYTES = 4 * 2**30
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
# The header ends at a multiple of so many bytes.
_ALIGNMENT = 8
Shapes = Mapping[str, Sequence[int]]
Read = Callable[[str], torch.Tensor]


def refuse_taken(output: Path) -> None:
    """Raises ValueError unless `output` does not exist or is an empty directory."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty; choose another output directory")


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `output` at the end; nothing is left where writing fails.

    Raises ValueError where `output` is taken.
    """
    refuse_taken(output)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def into_shards(sizes: Mapping[str, int], max_bytes: int | None) -> list[list[str]]:
    """The names in `sizes` (name -> bytes), in their order, cut into files of at most `max_bytes`, where one of them
    alone is not larger. None: one file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if max_bytes is not None and shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_whole_tensors(
    directory: Path,
    shapes: Shapes,
    read: Read,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    max_bytes: int | None = SHARD_BYTES,
) -> list[Path]:
    """Write the tensors of `shapes` into `directory`; returns the files that hold them.

    Args:
        shapes: name -> shape of every tensor.
        read: gives one whole tensor by its name, of any dtype, on any device.
        dtype: of what is written, float32 or bfloat16.
        metadata: of each file.
        max_bytes: that the tensors of one file may take, see `into_shards`. Where they take several files, the index
            says which tensor is in which.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = into_shards(sizes, max_bytes)
    paths, weight_map = [], dict[str, str]()
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else WEIGHTS
        _write_file(directory / file, {name: shapes[name] for name in names}, read, dtype, metadata)
        weight_map |= dict.fromkeys(names, file)
        paths.append(directory / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def _write_file(path: Path, shapes: Shapes, read: Read, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """One file in the safetensors format: length of the header (8 bytes, little-endian), header (JSON), data."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, shape in shapes.items():
            tensor = read(name).detach().to("cpu", dtype)
            assert tensor.shape == torch.Size(shape), (name, tensor.shape, shape)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
