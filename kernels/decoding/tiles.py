"""How the products of a decoding step are cut into programs: one place, for every device that they run on.

The weights are read once, and nothing else counts: what matters is that every multiprocessor always waits for several
wide loads, and that all of them finish at about the same time.
"""

from __future__ import annotations

from typing import NamedTuple

from kernels.integers import next_power_of_two


class Tile(NamedTuple):
    """The part of a weight [N, K] that a program reads: `block_n` rows, in pieces of `block_k` columns.

    Attributes:
        block_n, block_k: powers of two; with several rows of inputs at least 16.
        num_warps: of 32 threads.
        num_stages: pieces that are on their way at a time, in a loop over them.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def choose(rows: int, outputs: int, inputs: int, weights: int = 1) -> Tile:
    """The tile of products of `rows` rows [M, K] with a weight [N, K], or with two of its size at the same places."""
    if rows == 1 and inputs <= 4096:
        # Two pieces without a loop: few registers, so that many programs share a multiprocessor.
        tile = Tile(4 // weights, 2048, 8, 1)
    elif rows == 1:
        tile = Tile(8 // weights, 1024, 4, 3)
    elif rows <= 16:
        tile = Tile(32, 256 // weights, 4, 4)
    else:
        tile = Tile(32, 128, 4, 4)
    return tile._replace(block_k=min(tile.block_k, max(16, next_power_of_two(inputs))))


def choose_whole(outputs: int, inputs: int) -> Tile:
    """The tile of the product of one row whose norm goes by heads: its `block_k` is the whole row."""
    width = max(16, next_power_of_two(inputs))
    return Tile(4 if outputs >= 1024 else 2, width, min(16, max(4, width // 512)), 1)
