"""mLSTM: linear attention with exponential (or sigmoid) input gates, forget gates and a matrix memory.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension of a head.
"""

import torch
from torch import Tensor

from kernels.mlstm.reference import mlstm_chunkwise, mlstm_recurrent, read_statistics
from kernels.mlstm.state import MLSTMState

__all__ = ["BACKENDS", "MLSTMState", "mlstm", "mlstm_statistics"]


def _reference(q: Tensor, *args, chunk_size: int, **kwargs) -> tuple[Tensor, MLSTMState | None]:
    if q.shape[1] == 1:
        return mlstm_recurrent(q, *args, **kwargs)
    return mlstm_chunkwise(q, *args, chunk_size=chunk_size, **kwargs)


# Name -> function with the signature of `mlstm` less its backend.
BACKENDS = {"auto": _reference, "reference": _reference}


def mlstm(
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
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState | None]:
    """The mLSTM cell over a sequence.

    With l = log sigmoid(fgate_preact) and i = igate_preact, each head does at each token (gate="exp"):

        m <- max(l + m, i)
        C <- exp(l + m_before - m) C + exp(i - m) k v^T
        n <- exp(l + m_before - m) n + exp(i - m) k
        h  = C^T q' / (max(|n^T q'|, exp(-m)) + eps)        with q' = q / sqrt(DK)

    gate="sigmoid" has the input gate sigmoid(igate_preact) and m = 0. The gradients are exact (m, on which the output
    depends through eps alone, counts as a constant), also those through both states.

    Sources: xLSTM-7B (arXiv 2503.13427), section 2; sigmoid gate: TFLA (arXiv 2503.14376).

    Args:
        q, k: [B, S, NH, DK], any floating dtype.
        v: [B, S, NH, DV].
        igate_preact, fgate_preact: [B, S, NH] pre-activations, after bias and soft cap.
        document_start: [B, S] bool, True at the first token of each document, which starts from an empty state: no
            number of an earlier document has any part in a later one's outputs or gradients. None: no document starts.
        initial_state: the state before the first token, for gate="exp" or "sigmoid" as it was made; None: empty.
        return_state: whether to return the state after the last token.
        gate: "exp" or "sigmoid".
        normaliser: False returns C^T q' itself; only with gate="sigmoid".
        eps: added to the denominator after the max.
        chunk_size: tokens per chunk of the chunkwise form; changes the speed, not the result.
        backend: one of BACKENDS; "auto" chooses.

    Returns:
        h: [B, S, NH, DV] in v's dtype. All is computed in float32 (float64 if any input is), without autocast.
        state: the state after the last token, or None.

    Raises:
        ValueError: shapes or settings that do not fit together.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown mLSTM backend {backend!r}; use one of {', '.join(BACKENDS)}")
    return BACKENDS[backend](
        q,
        k,
        v,
        igate_preact,
        fgate_preact,
        document_start=document_start,
        initial_state=initial_state,
        return_state=return_state,
        gate=gate,
        normaliser=normaliser,
        eps=eps,
        chunk_size=chunk_size,
    )


@torch.no_grad()
def mlstm_statistics(
    q: Tensor,
    k: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    *,
    document_start: Tensor | None = None,
    max_tokens: int = 256,
    gate: str = "exp",
) -> dict[str, Tensor]:
    """How the stabiliser and the normaliser behave on the first max_tokens tokens of the first sequence.

    Args:
        q, k, igate_preact, fgate_preact, document_start, gate: as for `mlstm`.
        max_tokens: how many tokens to look at; cost and memory grow with its square.

    Returns:
        0-d float32 tensors on the inputs' device, without waiting for it: "stabiliser_min" and "stabiliser_max" over
        tokens and heads, "normaliser_floor_fraction": the share of them where |n^T q'| <= exp(-m), so that the
        read-out is not normalised.
    """
    start = None if document_start is None else document_start[:1, :max_tokens]
    inputs = (x[:1, :max_tokens] for x in (q, k, igate_preact, fgate_preact))
    stabiliser, query_normaliser = read_statistics(*inputs, document_start=start, gate=gate)
    at_floor = query_normaliser.abs() <= torch.exp(-stabiliser)
    return {
        "stabiliser_min": stabiliser.min().float(),
        "stabiliser_max": stabiliser.max().float(),
        "normaliser_floor_fraction": at_floor.float().mean(),
    }
