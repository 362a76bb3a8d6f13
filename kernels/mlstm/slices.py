"""What a slice of a sequence does to the memory, and how the summaries of neighbouring slices become one.

With the log forget gates l_t of a slice and G their sum, a memory C that enters the slice leaves it as
exp(G) C + (what the slice's own tokens add), or as the latter alone where a document starts in the slice. Both
are part of the summary, so that summaries can be scanned by any associative order: in turn, in a tree, by doubling.

Source: the chunkwise form of xLSTM-7B (arXiv 2503.13427), section 2, with slices for chunks; the maximum in `combine`
is its stabiliser, and both weights there are at most 1.
Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.mlstm.inputs import CellInputs
from kernels.mlstm.state import MLSTMState
from kernels.precision import autocast_disabled, compute_dtype


@dataclass
class SliceSummary:
    """A slice of tokens as a function of the state before it.

    Attributes:
        state: what the slice's tokens from its last document start on (all, if none starts) leave in the memory.
        log_forget_sum: [B, NH] float32 (float64 for float64 inputs): the sum of log sigmoid(fgate_preact) over the same
            tokens. It has a gradient.
        document_started: [B] bool, whether a document started in the slice: then nothing of the state before survives.
    """

    state: MLSTMState
    log_forget_sum: Tensor
    document_started: Tensor

    @property
    def log_kept(self) -> Tensor:
        """[B, NH]: the logarithm of the share of the state before that survives; -inf where a document started."""
        return self.log_forget_sum.masked_fill(self.document_started[:, None], -torch.inf)

    @classmethod
    def of_state(cls, state: MLSTMState) -> SliceSummary:
        """Of no token at all, behind which the memory is `state`: what to begin with, before the first slice."""
        batch = len(state.m)
        started = torch.zeros(batch, dtype=torch.bool, device=state.m.device)
        return cls(state, torch.zeros_like(state.m), started)


def summarise(inputs: CellInputs, state: MLSTMState) -> SliceSummary:
    """The summary of the slice with these inputs, whose tokens leave `state`."""
    with autocast_disabled(inputs.fgate_preact):
        log_forget = F.logsigmoid(inputs.fgate_preact.to(compute_dtype(inputs.fgate_preact, state.m)))
        if inputs.document_start is None:
            started = torch.zeros(len(log_forget), dtype=torch.bool, device=log_forget.device)
            return SliceSummary(state, log_forget.sum(1), started)
        document = inputs.document_start.cumsum(1)
        is_earlier = (document != document[:, -1:])[..., None]
        # A gate of an earlier document may be -inf; its gradient is 0.
        return SliceSummary(state, log_forget.masked_fill(is_earlier, 0).sum(1), document[:, -1] > 0)


def combine(first: SliceSummary, second: SliceSummary) -> SliceSummary:
    """The summary of two neighbouring slices as one; associative, in float32 (float64 if any part is).

    The stabiliser m is a constant in the backward pass, as everywhere.

    Args:
        first: the earlier slice. Its state may continue an initial one.
        second: the slice behind it, with a state of its own tokens alone.
    """
    a, b = first.state, second.state
    dtype = compute_dtype(a.C, a.n, a.m, b.C, b.n, b.m, first.log_forget_sum, second.log_forget_sum)
    with autocast_disabled(a.C):
        log_kept = second.log_kept.to(dtype)
        m, kept, added = merge_weights(a.m.to(dtype), log_kept, b.m.to(dtype))

        def merged(earlier: Tensor, later: Tensor) -> Tensor:
            shape = (*kept.shape, *[1] * (earlier.dim() - kept.dim()))
            return kept.view(shape) * earlier.to(dtype) + added.view(shape) * later.to(dtype)

        started = second.document_started[:, None]
        return SliceSummary(
            MLSTMState(merged(a.C, b.C), merged(a.n, b.n), m),
            second.log_forget_sum.to(dtype) + first.log_forget_sum.to(dtype).masked_fill(started, 0),
            first.document_started | second.document_started,
        )


def merge_weights(log_scale_first: Tensor, log_kept: Tensor, log_scale_second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much of two neighbours' sums is in the sum of both, where each is exp(log_scale) times what is stored of it.

    Of any shape, float32 or float64. The scales are constants in the backward pass, `log_kept` is not.

    Args:
        log_scale_first: of what enters the second slice.
        log_kept: the logarithm of the share of it that leaves the second slice; -inf: none.
        log_scale_second: of what the second slice adds; finite.

    Returns:
        the scale of the sum, and the weights, each at most 1, of what is stored of the first and of the second.
    """
    log_scale_first, log_scale_second = log_scale_first.detach(), log_scale_second.detach()
    log_carried = log_kept + log_scale_first
    log_scale = torch.maximum(log_carried.detach(), log_scale_second)
    return log_scale, torch.exp(log_carried - log_scale), torch.exp(log_scale_second - log_scale)
