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


# Shared memory that a program needs at most: its pieces of weights and inputs, of 16 bits, as many as are on their way.
MOST_SHARED_BYTES = 112 * 1024
# Products of more rows than this, with nothing but a residual beside them, are PyTorch's: there cuBLAS is ahead.
MOST_ROWS_OF_PLAIN_PRODUCTS = 16


def choose(rows: int, outputs: int, inputs: int, weights: int = 1) -> Tile:
    """The tile of products of `rows` rows [M, K] with a weight [N, K], or with two of its size at the same places.

    Measured on an H200 in the shapes of the 7B (benchmarks/results/2026-11-30-inference.md).
    """
    if rows == 1 and inputs <= 4096:
        # One or two pieces without a loop: few registers, so that many programs share a multiprocessor.
        tile = Tile(4, 2048, 8, 1) if weights == 1 else Tile(1, 4096, 8, 1)
    elif rows == 1:
        tile = Tile(8 // weights, 1024, 4, 3)
    elif rows > MOST_ROWS_OF_PLAIN_PRODUCTS:
        tile = Tile(64, 128, 4, 3) if weights == 1 else Tile(64, 64, 4, 4)
    elif outputs >= 8192:
        tile = Tile(64, 128, 4, 4 if weights == 1 else 3)
    else:
        # Programs enough for every multiprocessor.
        tile = Tile(32, 256 // weights, 4, 4)
    return tile._replace(block_k=min(tile.block_k, max(16, next_power_of_two(inputs))))


def choose_whole(outputs: int, inputs: int) -> Tile:
    """The tile of the product of one row whose norm goes by heads: its `block_k` is the whole row."""
    width = max(16, next_power_of_two(inputs))
    return Tile(4 if outputs >= 1024 else 2, width, min(16, max(4, width // 512)), 1)
