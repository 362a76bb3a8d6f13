"""mLSTM: linear attention with exponential (or sigmoid) input gates, forget gates and a matrix memory.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import backend_choice
from kernels.mlstm.border import Border
from kernels.mlstm.inputs import CellInputs, CellSettings, cell_inputs, check
from kernels.mlstm.reference import (
    REFERENCE_CHUNK_SIZE,
    chunkwise_state,
    log_state_norms,
    mlstm_chunkwise,
    mlstm_recurrent,
    read_statistics,
)
from kernels.mlstm.slice_cell import ReferenceSlice, SliceForm, run_slice
from kernels.mlstm.slices import SliceSummary, combine, merge_weights, summarise
from kernels.mlstm.state import MLSTMState

__all__ = [
    "REFERENCE_CHUNK_SIZE",
    "Border",
    "CellSettings",
    "MLSTMState",
    "SliceSummary",
    "cell_inputs",
    "combine",
    "merge_weights",
    "mlstm",
    "mlstm_slice",
    "mlstm_state",
    "mlstm_state_norms",
    "mlstm_statistics",
]


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
    reference_chunk_size: int = REFERENCE_CHUNK_SIZE,
    keep_chunk_states: bool = True,
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
        reference_chunk_size: tokens per chunk of the reference; changes the speed, not the result. The Triton kernels
            choose their own (kernels.mlstm.chunkwise.tiles.chunk_tokens).
        keep_chunk_states: of the Triton kernels: keep the memory that enters each chunk for the backward pass (DK * DV
            numbers a chunk and head) rather than compute it again there. The reference keeps everything.
        backend: one of kernels.backend_choice.BACKENDS; "auto" is Triton on a CUDA device and the reference elsewhere.

    Returns:
        h: [B, S, NH, DV] in v's dtype. The reference computes in float32 (float64 if any input is), without autocast;
            the Triton kernels multiply matrices in q's dtype with float32 sums, and do all else in float32.
        state: the state after the last token, or None. Of the Triton kernels n is zeros if normaliser is False: nothing
            reads it then.

    Raises:
        ValueError: shapes or settings that do not fit together, or what the backend cannot do.
    """
    inputs = cell_inputs(k, v, igate_preact, fgate_preact, document_start, initial_state)
    settings = CellSettings(gate, normaliser, eps)
    check(q, inputs, settings)
    if backend_choice.choose("mLSTM", backend, q, lambda: _unsupported(q, inputs)) == "triton":
        from kernels.mlstm.chunkwise.cell import mlstm_triton

        return mlstm_triton(q, inputs, settings, return_state=return_state, keep_chunk_states=keep_chunk_states)
    if q.shape[1] == 1:
        return mlstm_recurrent(q, inputs, settings, return_state=return_state)
    return mlstm_chunkwise(q, inputs, settings, return_state=return_state, chunk_size=reference_chunk_size)


def mlstm_slice(
    q: Tensor,
    inputs: CellInputs,
    settings: CellSettings,
    *,
    border: Border,
    before: MLSTMState | None = None,
    reference_chunk_size: int = REFERENCE_CHUNK_SIZE,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """The mLSTM cell over a slice of a sequence whose other slices are computed elsewhere.

    The slices pass states forward before this is called (`mlstm_state` gives what they exchange), and gradients back
    while its backward pass runs: the gradients are then those of the whole sequence.

    Args:
        q: [B, S, NH, DK], of the slice's tokens.
        inputs: all else of them, from `cell_inputs`. The initial state is the one behind the earlier slices; it needs
            no graph of gradients, `border` takes its place.
        settings, reference_chunk_size, backend: as the arguments of `mlstm`.
        border: what connects the slice with its neighbours in the backward pass. It is called once with the gradient of
            the initial state, and then once asked for that of the state that leaves.
        before: the state before the whole sequence, whose gradient arrives at the first slice; None: the empty state.

    Returns:
        h as for `mlstm`, and the state that leaves. Whoever uses that state within the slice's own process has its
        gradient here; that of the next slice comes by the border.

    Raises:
        ValueError: as `mlstm`.
    """
    check(q, inputs, settings)
    form: SliceForm = ReferenceSlice(settings, reference_chunk_size)
    if backend_choice.choose("mLSTM", backend, q, lambda: _unsupported(q, inputs)) == "triton":
        from kernels.mlstm.chunkwise.slice_cell import TritonSlice

        form = TritonSlice(settings)
    return run_slice(form, q, inputs, border, before)


def mlstm_state(
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    *,
    document_start: Tensor | None = None,
    initial_state: MLSTMState | None = None,
    gate: str = "exp",
    normaliser: bool = True,
    backend: str = "auto",
) -> SliceSummary:
    """What a slice of a sequence does to the memory, at the cost of the recurrence between chunks.

    It is what ranks that share a sequence have to exchange: `combine` makes the summary of two neighbouring slices.

    Args:
        k, v, igate_preact, fgate_preact, document_start, gate, normaliser, backend: as for `mlstm`.
        initial_state: what the slice continues; the summary's state is then that behind all tokens so far, which only
            the first of several slices may have. None: nothing, so that the state is of the slice's own tokens, and m
            the largest log weight of any. (`mlstm` begins with an empty memory of m = 0: MLSTMState.empty.)

    Raises:
        ValueError: as `mlstm`.
    """
    inputs = cell_inputs(k, v, igate_preact, fgate_preact, document_start, initial_state)
    settings = CellSettings(gate, normaliser)
    check(k, inputs, settings, first="k")
    if backend_choice.choose("mLSTM", backend, k, lambda: _unsupported(k, inputs)) == "triton":
        from kernels.mlstm.chunkwise.cell import mlstm_state_triton

        return summarise(inputs, mlstm_state_triton(inputs, settings))
    return summarise(inputs, chunkwise_state(inputs, settings))


def _unsupported(q: Tensor, inputs: CellInputs) -> str | None:
    """Why the Triton kernels cannot take these inputs; None if they can."""
    k, v, igate_preact, fgate_preact, _, *state = inputs
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v have different dtypes ({q.dtype}, {k.dtype}, {v.dtype})"
    if any(x is not None and x.dtype == torch.float64 for x in (q, igate_preact, fgate_preact, *state)):
        return "there are float64 inputs"
    return None


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
    q, k, igate_preact, fgate_preact = (x[:1, :max_tokens] for x in (q, k, igate_preact, fgate_preact))
    inputs = cell_inputs(k, k[..., :0], igate_preact, fgate_preact, start)
    stabiliser, query_normaliser = read_statistics(q, inputs, CellSettings(gate))
    at_floor = query_normaliser.abs() <= torch.exp(-stabiliser)
    return {
        "stabiliser_min": stabiliser.min().float(),
        "stabiliser_max": stabiliser.max().float(),
        "normaliser_floor_fraction": at_floor.float().mean(),
    }


@torch.no_grad()
def mlstm_state_norms(
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    positions: Sequence[int],
    *,
    document_start: Tensor | None = None,
    gate: str = "exp",
) -> Tensor:
    """How large the memory of the first sequence is behind so many tokens.

    Args:
        k, v, igate_preact, fgate_preact, document_start, gate: as for `mlstm`.
        positions: numbers of tokens, rising from 1; cost and memory grow with the square of the last.

    Returns:
        [positions] float32 on the inputs' device, without waiting for it: ln of the Frobenius norm of the memory
        (unscaled: exp(m) C), mean over heads. Not a number behind the end of the sequence or of its first document.
    """
    length = min(positions[-1], k.shape[1])
    k, v, igate_preact, fgate_preact = (x[:1, :length] for x in (k, v, igate_preact, fgate_preact))
    start = None if document_start is None else document_start[:1, :length]
    inside = [position for position in positions if position <= length]
    found = log_state_norms(cell_inputs(k, v, igate_preact, fgate_preact, start), CellSettings(gate), inside)
    means = found[0].mean(0).float()
    if start is not None:
        # A later document begins with an empty memory.
        document = start[0].cumsum(0) - start[0, 0].to(torch.int64)
        means = means.masked_fill(torch.stack([document[position - 1] for position in inside]) > 0, torch.nan)
    return torch.cat([means, means.new_full((len(positions) - len(inside),), torch.nan)])
