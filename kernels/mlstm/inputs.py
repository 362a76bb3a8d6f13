"""The arguments of the mLSTM as every form of it takes them, and what each does to them first: check, raise the
precision, put heads before time.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.argument_shapes import check_bool, check_shapes
from kernels.mlstm.gates import GATES, log_gates
from kernels.mlstm.state import MLSTMState
from kernels.precision import compute_dtype


class CellInputs(NamedTuple):
    """What the memory is made of; the queries that read it stand beside. Or gradients of that, None where none is.

    k [B, S, NH, DK], v [B, S, NH, DV], igate_preact and fgate_preact [B, S, NH], document_start [B, S] bool, and the
    parts of the initial state: C [B, NH, DK, DV], n [B, NH, DK] and m [B, NH], all there or all None.
    """

    k: Tensor
    v: Tensor
    igate_preact: Tensor
    fgate_preact: Tensor
    document_start: Tensor | None
    C_initial: Tensor | None
    n_initial: Tensor | None
    m_initial: Tensor | None


class CellGradients(NamedTuple):
    """Of q and of the inputs of these names; of the initial state empty where there is none."""

    q: Tensor
    k: Tensor
    v: Tensor
    igate_preact: Tensor
    fgate_preact: Tensor
    C_initial: Tensor
    n_initial: Tensor


class CellSettings(NamedTuple):
    """Which mLSTM: the arguments of kernels.mlstm.mlstm of these names."""

    gate: str = "exp"
    normaliser: bool = True
    eps: float = 1e-6


class StepInputs(NamedTuple):
    """Everything of one step: q and k [B, NH, DK], v [B, NH, DV], gates [B, NH], and the parts of a DecodingState."""

    q: Tensor
    k: Tensor
    v: Tensor
    igate_preact: Tensor
    fgate_preact: Tensor
    C: Tensor
    n: Tensor
    m: Tensor


def cell_inputs(
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    document_start: Tensor | None = None,
    initial_state: MLSTMState | None = None,
) -> CellInputs:
    """From the public arguments, unchecked. m takes no part in any gradient."""
    tokens = (k, v, igate_preact, fgate_preact, document_start)
    if initial_state is None:
        return CellInputs(*tokens, None, None, None)
    return CellInputs(*tokens, initial_state.C, initial_state.n, initial_state.m.detach())


@dataclass
class PreparedInputs:
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


def prepare(q: Tensor, inputs: CellInputs, settings: CellSettings) -> PreparedInputs:
    """Check the arguments and bring them into the form above.

    Raises:
        ValueError: shapes or settings that do not fit together.
    """
    check(q, inputs, settings)
    k, v, igate_preact, fgate_preact, document_start, C, n, m = inputs
    batch, length, heads, key_dim = q.shape
    dtype = compute_dtype(q, k, v, igate_preact, fgate_preact)

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2).to(dtype)

    log_input, log_forget = log_gates(heads_first(igate_preact), heads_first(fgate_preact), settings.gate)
    no_start = q.new_zeros(batch, length, dtype=torch.bool)
    document = (no_start if document_start is None else document_start).cumsum(1)
    if C is None or n is None or m is None:
        state = MLSTMState.empty(batch, heads, key_dim, v.shape[-1], device=q.device, dtype=dtype)
    else:
        state = MLSTMState(C.to(dtype), n.to(dtype), m.to(dtype))
    return PreparedInputs(
        heads_first(q) * key_dim**-0.5, heads_first(k), heads_first(v), log_input, log_forget, document, state
    )


def check(q: Tensor, inputs: CellInputs, settings: CellSettings, *, first: str = "q") -> None:
    """Raise ValueError for arguments of `mlstm` that do not fit together; `first` is what the caller calls its q."""
    if settings.gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, not {settings.gate!r}")
    if settings.gate == "exp" and not settings.normaliser:
        raise ValueError("gate=exp needs the normaliser: set normaliser=true, or gate=sigmoid to go without")
    if q.dim() != 4 or q.shape[1] == 0:
        raise ValueError(f"{first} must be [B, S, NH, DK] with at least one token, got {tuple(q.shape)}")
    batch, length, heads, key_dim = q.shape
    value_dim = inputs.v.shape[-1]
    check_bool(inputs.document_start)
    shapes = {
        "k": (batch, length, heads, key_dim),
        "v": (batch, length, heads, value_dim),
        "igate_preact": (batch, length, heads),
        "fgate_preact": (batch, length, heads),
        "document_start": (batch, length),
        "initial_state.C": (batch, heads, key_dim, value_dim),
        "initial_state.n": (batch, heads, key_dim),
        "initial_state.m": (batch, heads),
    }
    given = zip(shapes.items(), inputs, strict=True)
    check_shapes(first, q, {name: (x, shape) for (name, shape), x in given if x is not None})
