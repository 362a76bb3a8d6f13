"""What an sLSTM layer carries from one token to the next.

Axes: B batch, NH heads, DH dimension of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SLSTMState:
    """Memory after some tokens, stabilised: the true cell and normaliser are exp(m) * c and exp(m) * n.

    Source: xLSTM (arXiv 2405.04517), section 2.2 and appendix A.2.

    Attributes:
        h: [B, NH, DH] the last output, float32 (float64 for float64 inputs); so are the others.
        c: [B, NH, DH] cell.
        n: [B, NH, DH] normaliser; 0 marks a cell that has seen nothing.
        m: [B, NH, DH] stabiliser. It never carries a gradient: outputs do not depend on it.
    """

    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, head_dim: int, *, device: torch.device, dtype: torch.dtype) -> SLSTMState:
        """The state before the first token of a document: zeros."""
        return cls(*(torch.zeros(batch, heads, head_dim, device=device, dtype=dtype) for _ in range(4)))

    def detach(self) -> SLSTMState:
        """The same values, cut off from the graph that made them."""
        return SLSTMState(self.h.detach(), self.c.detach(), self.n.detach(), self.m.detach())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SLSTMState:
        """The same state on another device or in another precision."""
        return SLSTMState(*(part.to(device=device, dtype=dtype) for part in (self.h, self.c, self.n, self.m)))
