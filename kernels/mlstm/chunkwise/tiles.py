"""How each kernel cuts its work into tiles, by shape.

Axes: rows and columns of the tile that a program owns; head dimensions (`inner`) and tokens that one step takes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kernels.backend_choice import INTERPRETED
from kernels.integers import next_power_of_two

# One file for each GPU that was tuned.
TABLES = Path(__file__).parent / "tuned"
# Up to so many, a recurrence needs small tiles to reach all multiprocessors.
FEW_SEQUENCES = 16


@dataclass(frozen=True)
class Tile:
    """The cut of one kernel. All sizes are powers of two, at least 16."""

    rows: int
    columns: int
    inner: int
    tokens: int
    warps: int
    stages: int

    def within(self, rows: int, columns: int, inner: int) -> Tile:
        """The same tile, no larger than (the next power of two of) the dimensions it runs over."""
        return dataclasses.replace(
            self,
            rows=min(self.rows, _block(rows)),
            columns=min(self.columns, _block(columns)),
            inner=min(self.inner, _block(inner)),
        )


@dataclass(frozen=True)
class Tiles:
    """One cut for each matrix kernel. In `states` rows are dimensions of the first factor.

    chunk: tokens of a chunk; every tile's rows of tokens divide it.
    """

    chunk: int
    states: Tile
    scores: Tile
    read_out: Tile
    score_gradients: Tile
    gradients: Tile


def _block(size: int) -> int:
    return max(16, next_power_of_two(size))


SIXTEEN_BIT = Tiles(
    chunk=128,
    states=Tile(rows=64, columns=128, inner=16, tokens=128, warps=4, stages=3),
    scores=Tile(rows=64, columns=64, inner=64, tokens=16, warps=4, stages=3),
    read_out=Tile(rows=64, columns=128, inner=64, tokens=64, warps=4, stages=3),
    score_gradients=Tile(rows=64, columns=64, inner=64, tokens=16, warps=4, stages=3),
    gradients=Tile(rows=64, columns=128, inner=64, tokens=64, warps=8, stages=4),
)
# Exact float32 products run outside the tensor cores and need room in registers.
THIRTY_TWO_BIT = Tiles(
    chunk=64,
    states=Tile(rows=32, columns=32, inner=16, tokens=32, warps=4, stages=2),
    scores=Tile(rows=32, columns=32, inner=32, tokens=16, warps=4, stages=2),
    read_out=Tile(rows=32, columns=32, inner=32, tokens=32, warps=4, stages=2),
    score_gradients=Tile(rows=32, columns=32, inner=32, tokens=16, warps=4, stages=2),
    gradients=Tile(rows=32, columns=32, inner=32, tokens=32, warps=4, stages=2),
)


def choose_tiles(dtype: torch.dtype, key_dim: int, value_dim: int, sequences: int, device: torch.device) -> Tiles:
    """The cut for inputs of this precision, these head dimensions and so many sequences times heads.

    The number of sequences may change the rows and columns of a tile, never the order in which anything is summed.
    """
    # Sizes are symbols where torch.compile traces. It asks for shapes alone, and those depend on the chunk and thus not
    # on the number of sequences; the head dimensions are constants of the kernels.
    few = isinstance(sequences, int) and sequences <= FEW_SEQUENCES
    return _choose(dtype, int(key_dim), int(value_dim), few, device)


@lru_cache(maxsize=256)
def _choose(dtype: torch.dtype, key_dim: int, value_dim: int, few_sequences: bool, device: torch.device) -> Tiles:
    if dtype == torch.float32 or INTERPRETED:
        return fit(THIRTY_TWO_BIT, key_dim, value_dim)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return fit(tuned(name).get((key_dim, value_dim, few_sequences), SIXTEEN_BIT), key_dim, value_dim)


def chunk_tokens(key_dim: int, value_dim: int, dtype: torch.dtype, device_name: str) -> int:
    """Tokens of a chunk of the Triton kernels on a GPU, which need not be here.

    Args:
        key_dim, value_dim: DK and DV of the heads.
        dtype: of q, k and v.
        device_name: as torch.cuda.get_device_name returns it, such as "NVIDIA H200"; one without a table has the chunk
            of all that were not tuned.
    """
    if dtype == torch.float32:
        return THIRTY_TWO_BIT.chunk
    # Few sequences and many have the same chunk, or else a batch would be summed in another order than its rows.
    table = tuned(device_name)
    found = table.get((key_dim, value_dim, False)) or table.get((key_dim, value_dim, True)) or SIXTEEN_BIT
    return found.chunk


@lru_cache(maxsize=8)
def tuned(device_name: str) -> dict[tuple[int, int, bool], Tiles]:
    """What benchmarks/tune_mlstm.py found for a GPU: (DK, DV, are the sequences few) -> tiles; empty if untuned."""
    path = table_path(device_name)
    if not path.is_file():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return {(e["key_dim"], e["value_dim"], e["few_sequences"]): parse_tiles(e["tiles"]) for e in entries}


def table_path(device_name: str) -> Path:
    """Where the tiles that were tuned for a GPU are, if any were."""
    return TABLES / f"{device_name.replace(' ', '_')}.json"


def parse_tiles(values: dict[str, Any]) -> Tiles:
    """Tiles from the form that dataclasses.asdict gives."""
    cuts = {name: Tile(**cut) for name, cut in values.items() if name != "chunk"}
    return Tiles(chunk=values["chunk"], **cuts)


def fit(tiles: Tiles, key_dim: int, value_dim: int) -> Tiles:
    """The same cut with every tile inside the head dimensions."""
    return dataclasses.replace(
        tiles,
        # Backwards and forwards share this cut, and the first factor has the key dimension in both.
        states=tiles.states.within(key_dim, value_dim, 16),
        scores=tiles.scores.within(tiles.chunk, tiles.chunk, key_dim),
        read_out=tiles.read_out.within(tiles.chunk, value_dim, key_dim),
        score_gradients=tiles.score_gradients.within(tiles.chunk, tiles.chunk, min(key_dim, value_dim)),
        gradients=tiles.gradients.within(tiles.chunk, value_dim, min(key_dim, value_dim)),
    )
