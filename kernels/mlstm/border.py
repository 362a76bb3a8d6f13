"""Gradients across the borders of a slice whose neighbours are computed elsewhere.

The state that leaves slice r is the one that enters slice r + 1. In the backward pass, with U the gradient of the
entering state by the slice's own outputs, X that by all that follows, and e^G the share of the state that the slice
keeps:

    X_r = U_r + e^G X_(r+1)

which is the recurrence of the state in the other direction: U_r is found first, whoever connects the slices scans, and
X_(r+1) is the gradient of the state that leaves slice r, from which one backward pass gives all others.

Source: derived from the recurrence of arXiv 2503.13427, section 2.
Axes: B batch, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kernels.mlstm.state import MLSTMState


class Border(Protocol):
    """What connects a slice with those before and behind it, in the backward pass.

    Gradients are exchanged as states are: exp(m) C and exp(m) n are the gradients of exp(m') C' and exp(m') n', the
    true memory and normaliser.
    """

    @property
    def is_first(self) -> bool:
        """Whether no slice is before this one."""
        ...

    def start_back(self, gradient: MLSTMState) -> None:
        """Begin to send the gradient of the state that entered, by this slice's own results, to the earlier slices."""
        ...

    def leaving_gradient(self) -> MLSTMState | None:
        """Wait for the gradient of the state that leaves, by all later slices; None behind the last one."""
        ...


class SliceEnd:
    """A border, and the stabilisers [B, NH] of the states that enter and leave: gradients of what is stored of them."""

    def __init__(self, border: Border, m_entering: Tensor, m_leaving: Tensor):
        self._border, self._m_entering, self._m_leaving = border, m_entering, m_leaving

    def start_back(self, grad_C: Tensor, grad_n: Tensor) -> None:
        """From the gradients of the stored C [B, NH, DK, DV] and n [B, NH, DK] that entered."""
        self._border.start_back(MLSTMState(grad_C, grad_n, -self._m_entering))

    def leaving_gradient(self, grad_C: Tensor | None, grad_n: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the stored C and n that leave, where `grad_C` and `grad_n` are those by this rank's use."""
        later = self._border.leaving_gradient()
        if later is None:
            return grad_C, grad_n
        # At most 1: the stabiliser of what enters a slice is at least that of each part of it.
        scale = torch.exp(later.m + self._m_leaving)
        of_C, of_n = later.C * scale[..., None, None], later.n * scale[..., None]
        return of_C if grad_C is None else of_C + grad_C, of_n if grad_n is None else of_n + grad_n
