"""The mLSTM in Triton: quadratic inside chunks, recurrent between them.

Source of the form: xLSTM-7B (arXiv 2503.13427), section 2; TFLA (arXiv 2503.14376), section 2. Here everything that
depends on the gates alone is computed first (gates.py), then the recurrence between chunks (states.py), the weights
inside chunks (scores.py), and the read-out (read_out.py); backward.py has the gradients. launch.py runs them in order
and op.py makes operators of them.
"""

import torch
from torch import Tensor

from kernels.mlstm.chunkwise.op import _readable, mlstm_chunkwise
from kernels.mlstm.state import MLSTMState

__all__ = ["mlstm_triton"]


def mlstm_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    *,
    document_start: Tensor | None = None,
    initial_state: MLSTMState | None = None,
    return_state: bool = False,
    gate: str = "exp",
    normaliser: bool = True,
    eps: float = 1e-6,
    keep_chunk_states: bool = False,
) -> tuple[Tensor, MLSTMState | None]:
    """Arguments and result as kernels.mlstm.mlstm; q, k and v of one 16-bit or 32-bit dtype."""
    initial = (None, None, None)
    if initial_state is not None:
        initial = (initial_state.C, initial_state.n, initial_state.m.detach())
    h, C, n, m, *_ = mlstm_chunkwise(
        _readable(q),
        _readable(k),
        _readable(v),
        igate_preact.contiguous(),
        fgate_preact.contiguous(),
        document_start,
        *initial,
        return_state,
        gate,
        normaliser,
        eps,
        keep_chunk_states,
    )
    return h, MLSTMState(C, n, m.detach()) if return_state else None
