"""The sizes and settings of one call of the chunkwise mLSTM, as all of its launches see them.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension, BH batch times heads, NC chunks, L tokens of
a chunk; SP = NC * L, the sequence padded to whole chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.integers import ceil_div
from kernels.mlstm.chunkwise.tiles import Tile, Tiles, choose_tiles
from kernels.mlstm.inputs import CellInputs, CellSettings


@dataclass(frozen=True)
class Problem:
    """Sizes and settings of one call."""

    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int
    tiles: Tiles
    settings: CellSettings

    @classmethod
    def of(cls, inputs: CellInputs, settings: CellSettings) -> Problem:
        """The problem that the inputs pose."""
        batch, length, heads, key_dim = inputs.k.shape
        value_dim = inputs.v.shape[-1]
        tiles = choose_tiles(inputs.k.dtype, key_dim, value_dim, batch * heads, inputs.k.device)
        return cls(batch, length, heads, key_dim, value_dim, tiles, settings)

    @property
    def exponential(self) -> bool:
        return self.settings.gate == "exp"

    @property
    def normaliser(self) -> bool:
        return self.settings.normaliser

    @property
    def sequences(self) -> int:
        return self.batch * self.heads

    @property
    def chunks(self) -> int:
        return ceil_div(self.length, self.tiles.chunk)

    @property
    def padded(self) -> int:
        return self.chunks * self.tiles.chunk

    @property
    def row_stride(self) -> int:
        """Elements of one row of packed weights."""
        return self.sequences * self.padded

    @property
    def scale(self) -> float:
        return self.key_dim**-0.5

    def grid(self, tile: Tile, columns: int | None = None) -> tuple[int]:
        """Programs of a kernel with `tile.rows` tokens each, and `tile.columns` of so many columns."""
        column_tiles = 1 if columns is None else ceil_div(columns, tile.columns)
        return (column_tiles * (self.padded // tile.rows) * self.sequences,)


@dataclass(frozen=True)
class Documents:
    """Where documents begin: start [B, S] bool and number [B, S] int32; both None where nothing begins."""

    start: Tensor | None
    number: Tensor | None

    @classmethod
    def of(cls, document_start: Tensor | None) -> Documents:
        """From the public argument."""
        if document_start is None:
            return cls(None, None)
        return cls(document_start.contiguous(), document_start.cumsum(1, dtype=torch.int32))


def strides(x: Tensor) -> tuple[int, int, int]:
    assert x.stride(3) == 1, "the head dimension must be contiguous"
    return x.stride(0), x.stride(1), x.stride(2)
