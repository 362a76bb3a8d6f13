"""How the Triton kernels of the sLSTM divide the work of a head among cooperating programs.

Axes: B batch, NH heads, DH dimension of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.integers import ceil_div, next_power_of_two
from kernels.triton_support import INTERPRETED, multiprocessors

# The weights of larger heads do not fit on chip.
MAX_HEAD_DIM = {torch.float32: 256, torch.float16: 512, torch.bfloat16: 512}
# Teams that take turns where programs are interpreted: enough to show what one leaves behind for its next turn.
_INTERPRETED_TEAMS = 2
# A matrix product's smallest tile.
_SMALLEST = 16


@dataclass(frozen=True)
class Tiles:
    """A division of the work.

    Attributes:
        units: of a head that one program owns, a power of two from 16.
        rows: sequences of the batch that a team processes together, a power of two from 16.
        warps: of a program.
        resident: programs that share a multiprocessor.
        narrow: whether programs exchange gradients in bfloat16 where the weights are, or in float32.
    """

    units: int
    rows: int
    warps: int = 4
    resident: int = 1
    narrow: bool = True

    def team(self, head_dim: int) -> int:
        """Programs that share one head."""
        return ceil_div(head_dim, self.units)

    def width(self, head_dim: int) -> int:
        """The head dimension as the kernels see it: a power of two, and whole programs."""
        return next_power_of_two(max(head_dim, self.units))

    def teams(self, batch: int, heads: int, head_dim: int, device: torch.device) -> int:
        """Teams that run at once; all their programs must be resident together."""
        most = _INTERPRETED_TEAMS
        if device.type == "cuda":
            most = multiprocessors(device) * self.resident // self.team(head_dim)
        return min(ceil_div(batch, self.rows) * heads, most)


def default_tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """The division for a head dimension and the dtype of the matrix products."""
    if INTERPRETED:
        # Programs run one after the other, and would wait for each other for ever.
        return Tiles(units=next_power_of_two(max(head_dim, _SMALLEST)), rows=_SMALLEST)
    if dtype == torch.float32:
        return Tiles(units=16, rows=16, warps=4 if head_dim <= 128 else 8)
    # Measured at 256 and 512 on an H200: benchmarks/results/2026-11-24-slstm.md.
    if head_dim <= 256:
        return Tiles(units=32, rows=16, warps=4 if head_dim <= 128 else 8)
    return Tiles(units=32, rows=32, warps=8)
