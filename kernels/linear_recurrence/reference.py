"""The recurrence token by token in plain PyTorch, on any device: the specification. Axes as in the package."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear_recurrence.inputs import RecurrenceInputs
from kernels.precision import autocast_disabled, compute_dtype


def linear_recurrence_reference(
    inputs: RecurrenceInputs, document_start: Tensor | None, initial_state: Tensor | None, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    """As kernels.linear_recurrence.linear_recurrence, in float32 at least."""
    v, beta = inputs.v, inputs.beta
    dtype = compute_dtype(inputs.q, inputs.k, v, inputs.log_decay)
    with autocast_disabled(v):
        q, k, values = inputs.scale * inputs.q.to(dtype), inputs.k.to(dtype), v.to(dtype)
        decay = inputs.log_decay.to(dtype).exp()
        if decay.dim() == 3:
            decay = decay[..., None]
        if document_start is not None:
            decay = decay.masked_fill(document_start[:, :, None, None], 0)
        batch, length, heads, key_dim = k.shape
        state = values.new_zeros(batch, heads, key_dim, v.shape[-1])
        if initial_state is not None:
            state = initial_state.to(dtype)
        outputs = []
        for t in range(length):
            state = decay[:, t, :, :, None] * state
            written = values[:, t]
            if beta is not None:
                found = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
                written = beta[:, t, :, None].to(dtype) * (written - found)
            state = state + k[:, t, :, :, None] * written[:, :, None]
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        return torch.stack(outputs, dim=1).to(v.dtype), state if return_state else None
