"""The recurrence by the Triton kernels of flash-linear-attention (MIT), on a GPU. Axes as in the package.

Documents are its sequences of unequal length: the batch becomes one row in which each document, and each row's part of
one, begins at a place of `cu_seqlens`. That asks the GPU where documents begin, once a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_recurrence.inputs import RecurrenceInputs


@torch.compiler.disable
def linear_recurrence_fla(
    inputs: RecurrenceInputs, document_start: Tensor | None, initial_state: Tensor | None, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    """As kernels.linear_recurrence.linear_recurrence, on a CUDA device; the memory is float32."""
    v = inputs.v
    kernel = _kernel(per_feature=inputs.log_decay.dim() == 4, has_delta_rule=inputs.beta is not None)
    tensors = {"q": inputs.q, "k": inputs.k, "v": v, "g": inputs.log_decay}
    if inputs.beta is not None:
        tensors["beta"] = inputs.beta
    settings: dict[str, Any] = {"scale": inputs.scale, "output_final_state": return_state}
    if document_start is None:
        y, state = kernel(**tensors, **settings, initial_state=initial_state)
        return y.to(v.dtype), state if return_state else None
    starts, first = document_places(document_start)
    states = None
    if initial_state is not None:
        # Of each row's first piece, unless a document begins with it; all others begin empty.
        kept = initial_state.masked_fill(document_start[:, 0, None, None, None], 0)
        states = kept.new_zeros(len(starts) - 1, *kept.shape[1:]).index_copy(0, first, kept)
    rows = {name: tensor.flatten(0, 1)[None].contiguous() for name, tensor in tensors.items()}
    y, state = kernel(**rows, **settings, initial_state=states, cu_seqlens=starts)
    last = torch.cat([first[1:] - 1, first.new_tensor([len(starts) - 2])])
    return y.view(v.shape).to(v.dtype), state[last] if return_state else None


def document_places(document_start: Tensor) -> tuple[Tensor, Tensor]:
    """Where pieces of documents lie in document_start [B, S] bool, its rows one behind the other.

    Returns:
        starts [N + 1] int64: where each of N pieces begins, and B S. Every row begins one.
        first [B] int64: the number of each row's first piece.
    """
    begins = document_start.clone()
    begins[:, 0] = True
    first = F.pad(begins.sum(dim=1).cumsum(dim=0)[:-1], (1, 0))
    starts = begins.flatten().nonzero()[:, 0]
    return F.pad(starts, (0, 1), value=document_start.numel()), first


def _kernel(per_feature: bool, has_delta_rule: bool) -> Callable[..., Any]:
    """The function of fla.ops."""
    if has_delta_rule:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule
    if per_feature:
        from fla.ops.gla import chunk_gla

        return chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla
