"""The mLSTM in plain PyTorch, in its three equal forms: the specification that faster backends are tested against.

All three return the same outputs, states and gradients up to rounding, and the gradients are exact with one liberty:
the stabiliser m is a constant in the backward pass, because the output depends on it through eps alone.

Sources: xLSTM-7B (arXiv 2503.13427), section 2 and appendix; TFLA (arXiv 2503.14376), section 2.
Their arguments are explained in kernels/mlstm/inputs.py, their result is that of kernels.mlstm.mlstm.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension of a head, NC chunks, L tokens of a chunk.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.mlstm.gates import bounded_below, log_carry, log_weights, read_out, same_document
from kernels.mlstm.inputs import CellInputs, CellSettings, PreparedInputs, prepare
from kernels.mlstm.state import NOTHING, MLSTMState
from kernels.precision import autocast_disabled, compute_dtype

# Tokens per chunk of mlstm_chunkwise, unless told otherwise.
REFERENCE_CHUNK_SIZE = 64


def mlstm_recurrent(
    q: Tensor, inputs: CellInputs, settings: CellSettings, *, return_state: bool = False
) -> tuple[Tensor, MLSTMState | None]:
    """One token after the other: the definition, and the way to decode.

    Source: arXiv 2405.04517, equations 19 to 27, with the stabiliser of appendix A.3.
    """
    with autocast_disabled(q):
        x = prepare(q, inputs, settings)
        C, n, m = x.state.C, x.state.n, x.state.m
        outputs = []
        for t in range(q.shape[1]):
            if inputs.document_start is not None:
                starts = inputs.document_start[:, t, None]
                C = C.masked_fill(starts[..., None, None], 0)
                n = n.masked_fill(starts[..., None], 0)
                m = m.masked_fill(starts, 0)
            log_input, log_forget = x.log_input[:, :, t], x.log_forget[:, :, t]
            m_before = m
            if settings.gate == "exp":
                m = bounded_below(torch.maximum(log_forget + m_before, log_input)).detach()
            forget = torch.exp(log_forget + m_before - m)[..., None]
            key = x.k[:, :, t] * torch.exp(log_input - m)[..., None]
            C = forget[..., None] * C + key[..., None] * x.v[:, :, t, None, :]
            n = forget * n + key
            query = x.q[:, :, t]
            numerator = (query[..., None, :] @ C).squeeze(-2)
            outputs.append(read_out(numerator, (n * query).sum(-1), m, settings.normaliser, settings.eps))
        h = torch.stack(outputs, dim=1).to(inputs.v.dtype)
        return h, MLSTMState(C, n, m) if return_state else None


def mlstm_quadratic(
    q: Tensor, inputs: CellInputs, settings: CellSettings, *, return_state: bool = False
) -> tuple[Tensor, MLSTMState | None]:
    """Every token against every earlier one, as in attention.

    Source: arXiv 2405.04517, appendix A.3 ("parallel mLSTM forward pass"), with an initial state added.
    """
    with autocast_disabled(q):
        x = prepare(q, inputs, settings)
        weights, carried, m = _quadratic_weights(x, settings.gate)
        scores = (x.q @ x.k.transpose(-1, -2)) * weights
        numerator = scores @ x.v + carried[..., None] * (x.q @ x.state.C)
        query_normaliser = scores.sum(-1) + carried * (x.q @ x.state.n[..., None]).squeeze(-1)
        h = (
            read_out(numerator, query_normaliser, m, settings.normaliser, settings.eps)
            .transpose(1, 2)
            .to(inputs.v.dtype)
        )
        if not return_state:
            return h, None
        keys = x.k * weights[:, :, -1, :, None]
        kept = carried[:, :, -1, None]
        C = kept[..., None] * x.state.C + keys.transpose(-1, -2) @ x.v
        return h, MLSTMState(C, kept * x.state.n + keys.sum(-2), m[:, :, -1])


def _quadratic_weights(x: PreparedInputs, gate: str) -> tuple[Tensor, Tensor, Tensor]:
    """Stabilised weights of the tokens [B, NH, S, S] and of the initial state [B, NH, S], and the stabiliser."""
    readable = same_document(x.document)[:, None]
    log_weight = log_weights(x.log_input, x.log_forget, readable)
    log_kept = log_carry(x.log_forget, readable)
    continues = (x.document == 0)[:, None]
    m_before = x.state.m[..., None].masked_fill(~continues, 0)
    m = torch.zeros_like(log_kept)
    if gate == "exp":
        m = bounded_below(torch.maximum(log_kept + m_before, log_weight.amax(-1))).detach()
    carried = torch.exp((log_kept + m_before - m).masked_fill(~continues, -torch.inf))
    return torch.exp(log_weight - m[..., None]), carried, m


def read_statistics(q: Tensor, inputs: CellInputs, settings: CellSettings) -> tuple[Tensor, Tensor]:
    """The stabiliser m and the product n^T q' of every token, both [B, NH, S]."""
    with autocast_disabled(q):
        x = prepare(q, inputs, settings)
        weights, _, m = _quadratic_weights(x, settings.gate)
        return m, ((x.q @ x.k.transpose(-1, -2)) * weights).sum(-1)


def log_state_norms(inputs: CellInputs, settings: CellSettings, positions: Sequence[int]) -> Tensor:
    """ln of the Frobenius norm of the memory exp(m) C behind so many tokens: [B, NH, positions].

    |C_t|^2 = sum over s, r of w_s w_r (k_s k_r) (v_s v_r), where w_s is what token s weighs in C_t. C_t is not formed.
    """
    with autocast_disabled(inputs.k):
        x = prepare(inputs.k, inputs, settings)
        weights, _, m = _quadratic_weights(x, settings.gate)
        rows = torch.stack([weights[:, :, position - 1] for position in positions], dim=2)
        m = torch.stack([m[:, :, position - 1] for position in positions], dim=2)
        products = (x.k @ x.k.transpose(-1, -2)) * (x.v @ x.v.transpose(-1, -2))
        squares = ((rows @ products) * rows).sum(-1)
        return m + 0.5 * squares.clamp_min(torch.finfo(squares.dtype).tiny).log()


def mlstm_chunkwise(
    q: Tensor,
    inputs: CellInputs,
    settings: CellSettings,
    *,
    return_state: bool = False,
    chunk_size: int = REFERENCE_CHUNK_SIZE,
) -> tuple[Tensor, MLSTMState | None]:
    """Quadratic inside chunks, recurrent between them: the form to train with.

    Source: arXiv 2503.13427, section 2 ("chunkwise-parallel form"); arXiv 2503.14376, section 2.
    """
    if chunk_size < 1:
        raise ValueError(f"reference_chunk_size must be at least 1, not {chunk_size}")
    with autocast_disabled(q):
        x = prepare(q, inputs, settings)
        batch, length, heads, _ = q.shape
        chunk = min(chunk_size, length)
        padding = -length % chunk

        def in_chunks(sequence: Tensor) -> Tensor:
            return sequence.unflatten(2, (-1, chunk))

        # The normaliser is one more column of the memory: that of a value which is always 1.
        queries = in_chunks(F.pad(x.q, (0, 0, 0, padding)))
        keys = in_chunks(F.pad(x.k, (0, 0, 0, padding)))
        values = in_chunks(F.pad(F.pad(x.v, (0, 1), value=1), (0, 0, 0, padding)))
        log_input = in_chunks(F.pad(x.log_input, (0, padding), value=-torch.inf))
        log_forget = in_chunks(F.pad(x.log_forget, (0, padding)))
        document = torch.cat([x.document, x.document[:, -1:].expand(-1, padding)], dim=1)
        document = in_chunks(document[:, None])
        document_before = F.pad(document[..., :-1, -1], (1, 0))

        readable = same_document(document)
        log_weight = log_weights(log_input, log_forget, readable)
        log_kept = log_carry(log_forget, readable)
        continues = document == document_before[..., None]
        m, m_before = _chunk_stabilisers(log_weight, log_kept, continues, x.state.m, settings.gate)
        weights = torch.exp(log_weight - m[..., None])
        carried = torch.exp((log_kept + m_before[..., None] - m).masked_fill(~continues, -torch.inf))

        # What a chunk adds to the memory has the weights that its last token sees.
        added = (keys * weights[..., -1, :, None]).transpose(-1, -2) @ values
        kept = carried[..., -1, None, None]
        memory = torch.cat([x.state.C, x.state.n[..., None]], dim=-1)
        memories = []
        for kept_here, added_here in zip(kept.unbind(2), added.unbind(2), strict=True):
            memories.append(memory)
            memory = kept_here * memory + added_here

        scores = (queries @ keys.transpose(-1, -2)) * weights
        read = scores @ values + (queries * carried[..., None]) @ torch.stack(memories, dim=2)
        h = read_out(read[..., :-1], read[..., -1], m, settings.normaliser, settings.eps)
        h = h.flatten(2, 3)[:, :, :length].transpose(1, 2).to(inputs.v.dtype)
        state = MLSTMState(memory[..., :-1], memory[..., -1], m[:, :, -1, -1]) if return_state else None
        return h, state


def chunkwise_state(inputs: CellInputs, settings: CellSettings) -> MLSTMState:
    """The state behind the last token; without an initial state, of the tokens alone: m begins below that of any."""
    if inputs.C_initial is None:
        batch, _, heads, key_dim = inputs.k.shape
        dtype = compute_dtype(inputs.k, inputs.v, inputs.igate_preact, inputs.fgate_preact)
        value_dim, device = inputs.v.shape[-1], inputs.k.device
        nothing = MLSTMState.empty(batch, heads, key_dim, value_dim, device=device, dtype=dtype)
        m = nothing.m.fill_(NOTHING if settings.gate == "exp" else 0.0)
        inputs = inputs._replace(C_initial=nothing.C, n_initial=nothing.n, m_initial=m)
    # The state does not depend on the queries.
    state = mlstm_chunkwise(inputs.k, inputs, settings, return_state=True)[1]
    assert state is not None
    return state


@torch.no_grad()
def _chunk_stabilisers(
    log_weight: Tensor, log_kept: Tensor, continues: Tensor, m_initial: Tensor, gate: str
) -> tuple[Tensor, Tensor]:
    """The stabiliser of every token [B, NH, NC, L] and of the memory that enters each chunk [B, NH, NC]."""
    if gate != "exp":
        return torch.zeros_like(log_kept), torch.zeros_like(log_kept[..., 0])
    largest = log_weight.amax(-1)
    m, before, after = [], [], m_initial
    for chunk in range(log_kept.shape[2]):
        before.append(after)
        entering = after[..., None].masked_fill(~continues[:, :, chunk], 0)
        m.append(bounded_below(torch.maximum(log_kept[:, :, chunk] + entering, largest[:, :, chunk])))
        after = m[-1][..., -1]
    return torch.stack(m, dim=2), torch.stack(before, dim=2)
