"""Weights that several ranks have written in parts, as whole tensors under the names of the model's parameters."""

from __future__ import annotations

from pathlib import Path

import torch

from model.loading import StoredModel
from model.weights import save_whole
from model.whole_tensors import SHARD_BYTES, new_directory


def consolidate(
    stored: StoredModel,
    output: str | Path,
    dtype: torch.dtype = torch.float32,
    max_bytes: int | None = SHARD_BYTES,
) -> list[str]:
    """Write the weights of `stored` as a directory of whole weights, which `model.load` takes; returns their files.

    One parameter is in memory at a time, whatever number of files it is cut over.

    Args:
        output: must not exist yet, or be empty. Nothing is left there when writing fails.
        dtype: of what is written, float32 or bfloat16.
        max_bytes: that the tensors of one file may take, where one alone is not larger; None: all in one file.

    Raises:
        ValueError: the output directory is taken.
        WeightsError: a file of `stored` cannot be read.
    """
    with new_directory(Path(output)) as partial:
        files = save_whole(partial, stored.config, stored.shapes, stored.read, dtype, max_bytes)
    return [path.name for path in files]
