"""What every form of the mLSTM does to its arguments first: check, raise the precision, put heads before time.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.argument_shapes import check_bool, check_shapes
from kernels.mlstm.gates import GATES, log_gates
from kernels.mlstm.state import MLSTMState
from kernels.precision import compute_dtype


@dataclass
class MLSTMInputs:
    """Inputs in float32 (float64 if any was).

    Attributes:
        q: [B, NH, S, DK], scaled by DK^-1/2.
        k: [B, NH, S, DK].
        v: [B, NH, S, DV].
        log_input, log_forget: [B, NH, S].
        document: [B, S] number of each token's document; 0 continues the initial state.
        state: the state before the first token.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_input: Tensor
    log_forget: Tensor
    document: Tensor
    state: MLSTMState


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    document_start: Tensor | None,
    initial_state: MLSTMState | None,
    gate: str,
    normaliser: bool,
) -> MLSTMInputs:
    """Check the public arguments and bring them into the form above.

    Raises:
        ValueError: shapes or settings that do not fit together.
    """
    check(q, k, v, igate_preact, fgate_preact, document_start, initial_state, gate, normaliser)
    batch, length, heads, key_dim = q.shape
    dtype = compute_dtype(q, k, v, igate_preact, fgate_preact)

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2).to(dtype)

    log_input, log_forget = log_gates(heads_first(igate_preact), heads_first(fgate_preact), gate)
    no_start = q.new_zeros(batch, length, dtype=torch.bool)
    document = (no_start if document_start is None else document_start).cumsum(1)
    if initial_state is None:
        state = MLSTMState.empty(batch, heads, key_dim, v.shape[-1], device=q.device, dtype=dtype)
    else:
        state = MLSTMState(initial_state.C.to(dtype), initial_state.n.to(dtype), initial_state.m.detach().to(dtype))
    return MLSTMInputs(
        heads_first(q) * key_dim**-0.5, heads_first(k), heads_first(v), log_input, log_forget, document, state
    )


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    document_start: Tensor | None,
    initial_state: MLSTMState | None,
    gate: str,
    normaliser: bool,
    *,
    first: str = "q",
) -> None:
    """Raise ValueError for arguments of `mlstm` that do not fit together; `first` is what the caller calls its q."""
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, not {gate!r}")
    if gate == "exp" and not normaliser:
        raise ValueError("gate=exp needs the normaliser: set normaliser=true, or gate=sigmoid to go without")
    if q.dim() != 4 or q.shape[1] == 0:
        raise ValueError(f"{first} must be [B, S, NH, DK] with at least one token, got {tuple(q.shape)}")
    batch, length, heads, key_dim = q.shape
    expected = {
        "k": (k, (batch, length, heads, key_dim)),
        "v": (v, (batch, length, heads, v.shape[-1])),
        "igate_preact": (igate_preact, (batch, length, heads)),
        "fgate_preact": (fgate_preact, (batch, length, heads)),
    }
    check_bool(document_start)
    if document_start is not None:
        expected["document_start"] = (document_start, (batch, length))
    if initial_state is not None:
        expected["initial_state.C"] = (initial_state.C, (batch, heads, key_dim, v.shape[-1]))
        expected["initial_state.n"] = (initial_state.n, (batch, heads, key_dim))
        expected["initial_state.m"] = (initial_state.m, (batch, heads))
    check_shapes(first, q, expected)
