"""sLSTM: an LSTM with exponential input gates, a normaliser and recurrent connections inside each head.

Axes: B batch, S sequence, NH heads, DH dimension of a head.
"""

from torch import Tensor

from kernels import backend_choice
from kernels.slstm.loop import slstm_loop
from kernels.slstm.reference import slstm_recurrent
from kernels.slstm.state import SLSTMState

__all__ = ["SLSTMState", "slstm"]


def slstm(
    gates_x: Tensor,
    recurrent_kernel: Tensor,
    *,
    document_start: Tensor | None = None,
    initial_state: SLSTMState | None = None,
    return_state: bool = False,
    gate_soft_cap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SLSTMState | None]:
    """The sLSTM cell over a sequence.

    With (i, f, z, o) = gates_x + recurrent_kernel h_before, each cell does at each token:

        m <- max(log sigmoid(f) + m, i)                       (m <- i in a cell that has seen nothing)
        c <- sigmoid(f) exp(m_before - m) c + exp(i - m) tanh(z)
        n <- sigmoid(f) exp(m_before - m) n + exp(i - m)
        h  = sigmoid(o) c / n

    The gradients are exact, also those through both states.

    Source: xLSTM (arXiv 2405.04517), section 2.2 and appendix A.2.

    Args:
        gates_x: [B, S, 4, NH, DH] pre-activations of i, f, z, o from the input, bias included; any floating dtype.
        recurrent_kernel: [NH, DH, 4, DH] (input unit, gate, output unit).
        document_start: [B, S] bool, True at the first token of each document, which starts from an empty state: no
            number of an earlier document has any part in a later one's outputs or gradients. None: no document starts.
        initial_state: the state before the first token; None: empty.
        return_state: whether to return the state after the last token.
        gate_soft_cap: cap * tanh(x / cap) on the complete pre-activations of i and f; None: no cap.
        backend: one of kernels.backend_choice.BACKENDS. "reference" is the specification, differentiated by autograd;
            "triton" keeps the recurrent weights on chip for the whole sequence; "auto" is "triton" where it can run,
            and elsewhere a loop with a hand-written backward pass, equal to the reference and several times faster.

    Returns:
        h: [B, S, NH, DH] in gates_x's dtype. All is computed in float32 (float64 if any input is), without autocast;
            but "triton" takes the recurrent product in recurrent_kernel's dtype, or in autocast's, and adds in float32.
        state: the state after the last token, or None.

    Raises:
        ValueError: shapes or settings that do not fit together, or a backend that cannot do this.
    """
    form = slstm_recurrent if backend == "reference" else slstm_loop
    if backend_choice.choose("sLSTM", backend, gates_x, lambda: _unsupported(gates_x, recurrent_kernel)) == "triton":
        from kernels.slstm.triton_op import slstm_triton as form
    return form(
        gates_x,
        recurrent_kernel,
        document_start=document_start,
        initial_state=initial_state,
        return_state=return_state,
        gate_soft_cap=gate_soft_cap,
    )


def _unsupported(gates_x: Tensor, recurrent_kernel: Tensor) -> str | None:
    from kernels.slstm.triton_op import unsupported

    return unsupported(gates_x, recurrent_kernel)
