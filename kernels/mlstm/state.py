"""What an mLSTM layer carries from one token to the next.

Axes: B batch, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Stabiliser of a memory that nothing was ever put into, not even the empty memory of a document's beginning (m = 0).
NOTHING = -1e30


@dataclass
class MLSTMState:
    """Memory after some tokens, stabilised: the true memory and normaliser are exp(m) * C and exp(m) * n.

    Source: xLSTM-7B (arXiv 2503.13427), section 2; C here is the transpose of the C in arXiv 2405.04517.

    Attributes:
        C: [B, NH, DK, DV] matrix memory, float32 (float64 for float64 inputs).
        n: [B, NH, DK] normaliser, same dtype.
        m: [B, NH] stabiliser, same dtype. It never carries a gradient: outputs do not depend on it but through eps.
    """

    C: Tensor
    n: Tensor
    m: Tensor

    @classmethod
    def empty(
        cls, batch: int, heads: int, key_dim: int, value_dim: int, *, device: torch.device, dtype: torch.dtype
    ) -> MLSTMState:
        """The state before the first token of a document: zeros."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        return cls(zeros(batch, heads, key_dim, value_dim), zeros(batch, heads, key_dim), zeros(batch, heads))

    def detach(self) -> MLSTMState:
        """The same values, cut off from the graph that made them."""
        return MLSTMState(self.C.detach(), self.n.detach(), self.m.detach())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MLSTMState:
        """The same state on another device or in another precision."""
        return MLSTMState(*(part.to(device=device, dtype=dtype) for part in (self.C, self.n, self.m)))
