"""What every form of the sLSTM does to its arguments first: check, raise the precision, put time and heads first.

Axes: B batch, S sequence, NH heads, DH dimension of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.argument_shapes import check_bool, check_shapes
from kernels.precision import compute_dtype
from kernels.slstm.state import SLSTMState


@dataclass
class SLSTMInputs:
    """Inputs in float32 (float64 if any was).

    Attributes:
        gates_x: [S, NH, B, 4 * DH], contiguous.
        recurrent_kernel: [NH, DH, 4 * DH].
        starts: [S, B, 1] bool, or None.
        h, c, n, m: [NH, B, DH], the state before the first token; m is -inf where the cell has seen nothing.
    """

    gates_x: Tensor
    recurrent_kernel: Tensor
    starts: Tensor | None
    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


def prepare(
    gates_x: Tensor,
    recurrent_kernel: Tensor,
    document_start: Tensor | None,
    initial_state: SLSTMState | None,
    gate_soft_cap: float | None,
) -> SLSTMInputs:
    """Check the public arguments and bring them into the form above.

    Raises:
        ValueError: shapes or settings that do not fit together.
    """
    check(gates_x, recurrent_kernel, document_start, initial_state, gate_soft_cap)
    batch, _, _, heads, head_dim = gates_x.shape
    dtype = compute_dtype(gates_x, recurrent_kernel)
    if initial_state is None:
        initial_state = SLSTMState.empty(batch, heads, head_dim, device=gates_x.device, dtype=dtype)
    h, c, n, m = (
        part.to(dtype).transpose(0, 1)
        for part in (initial_state.h, initial_state.c, initial_state.n, initial_state.m.detach())
    )
    return SLSTMInputs(
        gates_x=gates_x.to(dtype).permute(1, 3, 0, 2, 4).flatten(-2).contiguous(),
        recurrent_kernel=recurrent_kernel.to(dtype).flatten(-2),
        starts=None if document_start is None else document_start.t()[..., None],
        h=h,
        c=c,
        n=n,
        m=stabiliser(n, m),
    )


def stabiliser(n: Tensor, m: Tensor) -> Tensor:
    """m to start from: a cell that has seen nothing must not hold its first input against an old maximum."""
    return m.masked_fill(n == 0, -torch.inf)


def final_state(h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> SLSTMState:
    """The public state from parts [NH, B, DH]."""
    return SLSTMState(*(part.transpose(0, 1) for part in (h, c, n, m)))


def check(
    gates_x: Tensor,
    recurrent_kernel: Tensor,
    document_start: Tensor | None,
    initial_state: SLSTMState | None,
    gate_soft_cap: float | None,
) -> None:
    if gates_x.dim() != 5 or gates_x.shape[1] == 0 or gates_x.shape[2] != 4:
        raise ValueError(f"gates_x must be [B, S, 4, NH, DH] with at least one token, got {tuple(gates_x.shape)}")
    if gate_soft_cap is not None and gate_soft_cap <= 0:
        raise ValueError(f"gate_soft_cap must be positive, not {gate_soft_cap}; use null for no cap")
    batch, length, _, heads, head_dim = gates_x.shape
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "recurrent_kernel": (recurrent_kernel, (heads, head_dim, 4, head_dim))
    }
    check_bool(document_start)
    if document_start is not None:
        expected["document_start"] = (document_start, (batch, length))
    if initial_state is not None:
        for name in ("h", "c", "n", "m"):
            expected[f"initial_state.{name}"] = (getattr(initial_state, name), (batch, heads, head_dim))
    check_shapes("gates_x", gates_x, expected)
