"""The mLSTM in Triton: quadratic inside chunks, recurrent between them.

Source of the form: xLSTM-7B (arXiv 2503.13427), section 2; TFLA (arXiv 2503.14376), section 2. Here everything that
depends on the gates alone is computed first (gates.py), then the recurrence between chunks (states.py), the weights
inside chunks (scores.py), and the read-out (read_out.py); backward.py has the gradients. launch.py and
launch_backward.py run them in order and op.py makes operators of them.
"""

from torch import Tensor

from kernels.mlstm.chunkwise.op import mlstm_chunkwise, mlstm_chunkwise_state, readable
from kernels.mlstm.state import MLSTMState

__all__ = ["mlstm_state_triton", "mlstm_triton"]


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
    h, C, n, m, *_ = mlstm_chunkwise(
        readable(q),
        readable(k),
        readable(v),
        igate_preact.contiguous(),
        fgate_preact.contiguous(),
        document_start,
        *_parts(initial_state),
        return_state,
        gate,
        normaliser,
        eps,
        keep_chunk_states,
    )
    return h, MLSTMState(C, n, m.detach()) if return_state else None


def mlstm_state_triton(
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    *,
    document_start: Tensor | None = None,
    initial_state: MLSTMState | None = None,
    gate: str = "exp",
    normaliser: bool = True,
) -> MLSTMState:
    """Arguments and result as kernels.mlstm.mlstm_state; k and v of one 16-bit or 32-bit dtype."""
    C, n, m, *_ = mlstm_chunkwise_state(
        readable(k),
        readable(v),
        igate_preact.contiguous(),
        fgate_preact.contiguous(),
        document_start,
        *_parts(initial_state),
        gate,
        normaliser,
    )
    return MLSTMState(C, n, m.detach())


def _parts(state: MLSTMState | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if state is None else (state.C, state.n, state.m.detach())
