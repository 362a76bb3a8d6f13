"""One token through the mLSTM, on a state that is updated where it lies: what decoding repeats.

Axes: B batch, NH heads, DK query/key and DV value dimension of a head, T groups of columns of the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import backend_choice
from kernels.mlstm.gates import bounded_below, log_gates, read_out
from kernels.mlstm.inputs import CellInputs, CellSettings, StepInputs, cell_inputs, check
from kernels.mlstm.state import MLSTMState
from kernels.precision import autocast_disabled, compute_dtype

# The largest DK that one Triton program holds, with 16 columns of the memory.
MAX_KEY_DIM = 2048


@dataclass
class DecodingState:
    """An MLSTMState that steps overwrite where it lies; whoever holds it continues it once only.

    Each group of adjacent columns of C has a copy of n and m of its own, all equal: the programs of a GPU that update
    the groups then need not wait for each other. The copies are a few percent of C.

    Attributes:
        C: [B, NH, DK, DV] float32 (float64 on the reference), contiguous, as the others.
        n: [B, NH, T, DK].
        m: [B, NH, T].
    """

    C: Tensor
    n: Tensor
    m: Tensor

    @classmethod
    def of(cls, state: MLSTMState, columns: int | None = None) -> DecodingState:
        """A copy of `state` in groups of `columns` columns (a power of two of at least 16); None: what suits a GPU.

        Raises:
            ValueError: another number of columns.
        """
        if columns is not None and (columns < 16 or columns & (columns - 1)):
            raise ValueError(f"columns must be a power of two of at least 16, not {columns}")
        key_dim, value_dim = state.C.shape[-2:]
        if columns is None:
            # Enough programs for a whole GPU at B = 1; whole cache lines of 128 bytes where the keys leave room.
            columns = 32 if key_dim <= 256 else 16
        groups = -(-value_dim // columns)
        C = state.C.detach().clone(memory_format=torch.contiguous_format)
        n, m = (part.detach()[:, :, None] for part in (state.n, state.m))
        return cls(C, n.repeat(1, 1, groups, 1), m.repeat(1, 1, groups))

    def as_mlstm_state(self) -> MLSTMState:
        """The same numbers, in the same memory."""
        return MLSTMState(self.C, self.n[:, :, 0], self.m[:, :, 0])


@torch.no_grad()
def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    state: DecodingState,
    *,
    gate: str = "exp",
    normaliser: bool = True,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """The mLSTM cell (kernels.mlstm.mlstm) for one token. No gradients.

    The Triton backend is one kernel launch, reads and writes the state once, and can be captured in a CUDA graph.

    Args:
        q, k: [B, NH, DK], any floating dtype.
        v: [B, NH, DV].
        igate_preact, fgate_preact: [B, NH] pre-activations, after bias and soft cap.
        state: the state before the token; it holds the one behind the token when the call returns.
        gate, normaliser, eps: as for mlstm.
        backend: one of kernels.backend_choice.BACKENDS; "auto" chooses.

    Returns:
        h: [B, NH, DV] in v's dtype. All is computed in float32 (float64 if any input is), without autocast.

    Raises:
        ValueError: shapes or settings that do not fit together, or what the backend cannot do.
    """
    if q.dim() != 3:
        raise ValueError(f"q must be [B, NH, DK], got {tuple(q.shape)}")
    inputs = StepInputs(q, k, v, igate_preact, fgate_preact, state.C, state.n, state.m)
    settings = CellSettings(gate, normaliser, eps)
    check(q[:, None], _as_sequence(inputs), settings)
    if backend_choice.choose("mLSTM step", backend, q, lambda: _unsupported(inputs)) == "reference":
        return mlstm_step_reference(inputs, settings)
    from kernels.mlstm import step_fused

    return step_fused.mlstm_step(inputs, settings)


def mlstm_step_reference(inputs: StepInputs, settings: CellSettings) -> Tensor:
    """The specification: one token of kernels.mlstm.reference.mlstm_recurrent, with the state changed where it lies."""
    q, k, v, igate_preact, fgate_preact, C, n, m = inputs
    with autocast_disabled(q):
        dtype = compute_dtype(q, k, v, igate_preact, fgate_preact)
        log_input, log_forget = log_gates(igate_preact.to(dtype), fgate_preact.to(dtype), settings.gate)
        # The copies of each group of columns stay equal.
        carried = log_forget[..., None] + m
        if settings.gate == "exp":
            m.copy_(bounded_below(torch.maximum(carried, log_input[..., None])))
        forget = torch.exp(carried - m)[..., :1]
        key = k.to(dtype) * torch.exp(log_input[..., None] - m[..., :1])
        C.mul_(forget[..., None]).addcmul_(key[..., None].to(C.dtype), v[:, :, None].to(C.dtype))
        n.mul_(forget[..., None]).add_(key[:, :, None])
        query = q.to(dtype) * q.shape[-1] ** -0.5
        numerator = (query[:, :, None] @ C.to(dtype)).squeeze(2)
        query_normaliser = (n[:, :, 0] * query).sum(-1)
        return read_out(numerator, query_normaliser, m[..., 0], settings.normaliser, settings.eps).to(v.dtype)


def _as_sequence(inputs: StepInputs) -> CellInputs:
    """A sequence of one token: [B, ...] -> [B, 1, ...]."""
    k, v, igate_preact, fgate_preact = (x[:, None] for x in inputs[1:5])
    state = DecodingState(inputs.C, inputs.n, inputs.m).as_mlstm_state()
    return cell_inputs(k, v, igate_preact, fgate_preact, None, state)


def _unsupported(inputs: StepInputs) -> str | None:
    if any(tensor.dtype == torch.float64 for tensor in inputs):
        return "the kernel computes in float32 and a tensor is float64"
    if any(part.dtype != torch.float32 or not part.is_contiguous() for part in (inputs.C, inputs.n, inputs.m)):
        return "the state must be float32 and contiguous"
    if inputs.q.shape[-1] > MAX_KEY_DIM:
        return f"key dimension {inputs.q.shape[-1]} is above {MAX_KEY_DIM}"
    return None
