"""The chunkwise mLSTM as operators of torch.library, so that torch.compile and checkpointing see single operations.

Two operators with gradients: `mlstm_chunkwise`, the whole cell, and `mlstm_chunkwise_state`, the state behind the last
token alone.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension, BH batch times heads, NC chunks, L tokens of
a chunk, SP = NC * L.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.mlstm.chunkwise import launch, launch_backward
from kernels.mlstm.chunkwise.gates import ADDED, WEIGHT_ROWS
from kernels.mlstm.chunkwise.launch import States
from kernels.mlstm.chunkwise.launch_backward import Reading
from kernels.mlstm.chunkwise.problem import Documents, Problem
from kernels.mlstm.chunkwise.read_out import MATRIX_WEIGHT, VECTOR_WEIGHT


def _flat(state: Tensor | None) -> Tensor | None:
    """A part of a state as the kernels read it: float32, contiguous."""
    return None if state is None else state.float().contiguous()


def _no_state(like: Tensor, count: int) -> list[Tensor]:
    # Operators return tensors, never None, and no two of them may share memory.
    return [like.new_empty(0, dtype=torch.float32) for _ in range(count)]


@torch.library.custom_op("xlstm_pretrain::mlstm_chunkwise", mutates_args=())
def mlstm_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    document_start: Tensor | None,
    C_initial: Tensor | None,
    n_initial: Tensor | None,
    m_initial: Tensor | None,
    return_state: bool,
    gate: str,
    normaliser: bool,
    eps: float,
    keep_chunk_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The cell; inputs with a contiguous last axis, contiguous gates.

    Returns:
        h [B, S, NH, DV]; C, n, m behind the last token (empty unless return_state); and what the backward pass needs:
        packed weights [7, BH, SP], chunk decays [BH, NC], query normaliser [BH, SP], and the states that enter the
        chunks: matrices [BH, NC, DK, DV] and vectors [BH, NC, DK] (empty unless keep_chunk_states).
    """
    with torch.cuda.device_of(k):
        problem = Problem.of(k, v, gate, normaliser, eps)
        documents = Documents.of(document_start)
        packed, chunk_decay, m = launch.weights(problem, igate_preact, fgate_preact, documents, _flat(m_initial))
        states = launch.states(
            problem,
            k,
            v,
            packed[ADDED],
            packed[ADDED],
            chunk_decay,
            (_flat(C_initial), _flat(n_initial)),
            store_after=return_state,
        )
        scores, query_normaliser = launch.scores(problem, q, k, packed, states.vectors, documents)
        h = launch.read_out(problem, q, v, packed, query_normaliser, states.matrices, scores)
        final = [states.matrix, states.vector, m] if return_state else _no_state(packed, 3)
        kept = [states.matrices, states.vectors] if keep_chunk_states else _no_state(packed, 2)
        return h, *final, packed, chunk_decay, query_normaliser, *kept


@mlstm_chunkwise.register_fake
def _(
    q, k, v, igate_preact, fgate_preact, document_start, C_initial, n_initial, m_initial,
    return_state, gate, normaliser, eps, keep_chunk_states,
):  # fmt: skip
    problem = Problem.of(k, v, gate, normaliser, eps)
    sequences, chunks = problem.sequences, problem.chunks
    packed = k.new_empty(WEIGHT_ROWS, sequences, problem.padded, dtype=torch.float32)
    final = _fake_state(problem, packed) if return_state else _no_state(packed, 3)
    kept = _no_state(packed, 2)
    if keep_chunk_states:
        kept = [
            k.new_empty(sequences, chunks, problem.key_dim, problem.value_dim),
            packed.new_empty(sequences, chunks, problem.key_dim),
        ]
    h = v.new_empty(v.shape)
    return h, *final, packed, packed.new_empty(sequences, chunks), packed.new_empty(sequences, problem.padded), *kept


def _fake_state(problem: Problem, like: Tensor) -> list[Tensor]:
    by_head = (problem.batch, problem.heads)
    return [
        like.new_empty(*by_head, problem.key_dim, problem.value_dim),
        like.new_empty(*by_head, problem.key_dim),
        like.new_empty(*by_head),
    ]


@torch.library.custom_op("xlstm_pretrain::mlstm_chunkwise_backward", mutates_args=())
def mlstm_chunkwise_backward(
    grad_h: Tensor,
    grad_C: Tensor | None,
    grad_n: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    document_start: Tensor | None,
    C_initial: Tensor | None,
    n_initial: Tensor | None,
    h: Tensor,
    packed: Tensor,
    chunk_decay: Tensor,
    query_normaliser: Tensor,
    matrices: Tensor | None,
    vectors: Tensor | None,
    gate: str,
    normaliser: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, igate_preact, fgate_preact, C_initial and n_initial (the last two empty without them)."""
    with torch.cuda.device_of(k):
        problem = Problem.of(k, v, gate, normaliser, eps)
        documents = Documents.of(document_start)
        has_initial = C_initial is not None
        if matrices is None:
            before = (_flat(C_initial), _flat(n_initial))
            entering = launch.states(problem, k, v, packed[ADDED], packed[ADDED], chunk_decay, before)
        else:
            entering = States(matrices, vectors, None, None)
        rows = launch_backward.row_weights(problem, h, grad_h, packed, query_normaliser)
        leaving = launch.states(
            problem,
            q,
            grad_h,
            rows[MATRIX_WEIGHT],
            rows[VECTOR_WEIGHT],
            chunk_decay,
            (_flat(grad_C), _flat(grad_n)),
            backwards=True,
            store_after=has_initial,
        )
        scores, grad_scores, sums = launch_backward.score_gradients(problem, q, k, v, grad_h, packed, rows, documents)
        reading = Reading(q, grad_h, rows, scores, grad_scores)
        tokens = launch_backward.token_gradients(problem, k, v, reading, packed, chunk_decay, entering, leaving)
        del entering
        gates = (igate_preact, fgate_preact)
        grad_gates = launch_backward.gate_gradients(problem, sums, tokens, *gates, documents, has_initial)
        grad_initial = [leaving.matrix, leaving.vector] if has_initial else _no_state(packed, 2)
        return tokens.q, tokens.k, tokens.v, *grad_gates, *grad_initial


@mlstm_chunkwise_backward.register_fake
def _(
    grad_h, grad_C, grad_n, q, k, v, igate_preact, fgate_preact, document_start, C_initial, n_initial, h,
    packed, chunk_decay, query_normaliser, matrices, vectors, gate, normaliser, eps,
):  # fmt: skip
    problem = Problem.of(k, v, gate, normaliser, eps)
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    grads += [packed.new_empty(gate.shape) for gate in (igate_preact, fgate_preact)]
    return *grads, *(_no_state(packed, 2) if C_initial is None else _fake_state(problem, packed)[:2])


def _setup_context(ctx, inputs, output):
    (
        q, k, v, igate_preact, fgate_preact, document_start, C_initial, n_initial, _,
        return_state, gate, normaliser, eps, keep_chunk_states,
    ) = inputs  # fmt: skip
    h, _, _, _, packed, chunk_decay, query_normaliser, matrices, vectors = output
    ctx.settings = (return_state, gate, normaliser, eps, keep_chunk_states)
    ctx.save_for_backward(
        q, k, v, igate_preact, fgate_preact, document_start, C_initial, n_initial, h,
        packed, chunk_decay, query_normaliser, matrices, vectors,
    )  # fmt: skip
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_h, grad_C, grad_n, *_):
    (
        q, k, v, igate_preact, fgate_preact, document_start, C_initial, n_initial, h,
        packed, chunk_decay, query_normaliser, matrices, vectors,
    ) = ctx.saved_tensors  # fmt: skip
    return_state, gate, normaliser, eps, keep_chunk_states = ctx.settings
    grad_h = torch.zeros_like(h) if grad_h is None else grad_h
    if not return_state:
        # Those of the empty tensors in the state's place.
        grad_C = grad_n = None
    elif grad_C is not None or grad_n is not None:
        grad_C, grad_n = _without_gaps(grad_C, grad_n, k, v)
    grads = mlstm_chunkwise_backward(
        readable(grad_h.to(h.dtype)),
        grad_C,
        grad_n,
        q,
        k,
        v,
        igate_preact,
        fgate_preact,
        document_start,
        C_initial,
        n_initial,
        h,
        packed,
        chunk_decay,
        query_normaliser,
        matrices if keep_chunk_states else None,
        vectors if keep_chunk_states else None,
        gate,
        normaliser,
        eps,
    )
    return *_as_inputs(grads, igate_preact, fgate_preact, C_initial, n_initial), None, None, None, None, None, None


def _without_gaps(grad_C: Tensor | None, grad_n: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the final state; zero where there is none."""
    batch, _, heads, key_dim = k.shape
    if grad_C is None:
        grad_C = k.new_zeros(batch, heads, key_dim, v.shape[-1], dtype=torch.float32)
    if grad_n is None:
        grad_n = k.new_zeros(batch, heads, key_dim, dtype=torch.float32)
    return grad_C, grad_n


def _as_inputs(grads, igate_preact, fgate_preact, C_initial, n_initial) -> list[Tensor | None]:
    """Gradients of (q, k, v, gates, no document starts, C, n, no m) in the inputs' precision."""
    grad_q, grad_k, grad_v, grad_i, grad_f, grad_C, grad_n = grads
    initial = [None, None]
    if C_initial is not None:
        initial = [grad_C.to(C_initial.dtype), grad_n.to(n_initial.dtype)]
    gates = [grad_i.to(igate_preact.dtype), grad_f.to(fgate_preact.dtype)]
    return [grad_q, grad_k, grad_v, *gates, None, *initial, None]


def readable(x: Tensor) -> Tensor:
    """x as the kernels can read it: the last axis contiguous, no axis expanded."""
    # Not x.contiguous(), which leaves the strides of what is empty, or of an axis of one element, as they are.
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.clone(memory_format=torch.contiguous_format)


mlstm_chunkwise.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("xlstm_pretrain::mlstm_chunkwise_state", mutates_args=())
def mlstm_chunkwise_state(
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    document_start: Tensor | None,
    C_initial: Tensor | None,
    n_initial: Tensor | None,
    m_initial: Tensor | None,
    gate: str,
    normaliser: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """C, n and m behind the last token, and for the backward pass the packed weights and the chunk decays."""
    with torch.cuda.device_of(k):
        problem = Problem.of(k, v, gate, normaliser, 0.0)
        documents = Documents.of(document_start)
        packed, chunk_decay, m = launch.weights(problem, igate_preact, fgate_preact, documents, _flat(m_initial))
        before = (_flat(C_initial), _flat(n_initial))
        states = launch.states(
            problem, k, v, packed[ADDED], packed[ADDED], chunk_decay, before, store_chunks=False, store_after=True
        )
        return states.matrix, states.vector, m, packed, chunk_decay


@mlstm_chunkwise_state.register_fake
def _(
    k, v, igate_preact, fgate_preact, document_start, C_initial, n_initial, m_initial, gate, normaliser
):  # fmt: skip
    problem = Problem.of(k, v, gate, normaliser, 0.0)
    packed = k.new_empty(WEIGHT_ROWS, problem.sequences, problem.padded, dtype=torch.float32)
    return *_fake_state(problem, packed), packed, packed.new_empty(problem.sequences, problem.chunks)


@torch.library.custom_op("xlstm_pretrain::mlstm_chunkwise_state_backward", mutates_args=())
def mlstm_chunkwise_state_backward(
    grad_C: Tensor,
    grad_n: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    document_start: Tensor | None,
    C_initial: Tensor | None,
    n_initial: Tensor | None,
    packed: Tensor,
    chunk_decay: Tensor,
    gate: str,
    normaliser: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, igate_preact, fgate_preact, C_initial and n_initial (the last two empty without them)."""
    with torch.cuda.device_of(k):
        problem = Problem.of(k, v, gate, normaliser, 0.0)
        documents = Documents.of(document_start)
        has_initial = C_initial is not None
        nothing = torch.zeros_like(packed[ADDED])
        before = (_flat(C_initial), _flat(n_initial))
        entering = launch.states(problem, k, v, packed[ADDED], packed[ADDED], chunk_decay, before)
        # Without a read-out, the gradient of the memory only decays from chunk to chunk.
        behind = (_flat(grad_C), _flat(grad_n))
        leaving = launch.states(
            problem, k, v, nothing, nothing, chunk_decay, behind, backwards=True, store_after=has_initial
        )
        no_sums = packed.new_zeros(2, problem.sequences, problem.padded)
        tokens = launch_backward.token_gradients(problem, k, v, None, packed, chunk_decay, entering, leaving)
        gates = (igate_preact, fgate_preact)
        grad_gates = launch_backward.gate_gradients(problem, no_sums, tokens, *gates, documents, has_initial)
        grad_initial = [leaving.matrix, leaving.vector] if has_initial else _no_state(packed, 2)
        return tokens.k, tokens.v, *grad_gates, *grad_initial


@mlstm_chunkwise_state_backward.register_fake
def _(
    grad_C, grad_n, k, v, igate_preact, fgate_preact, document_start, C_initial, n_initial, packed, chunk_decay,
    gate, normaliser,
):  # fmt: skip
    problem = Problem.of(k, v, gate, normaliser, 0.0)
    grads = [x.new_empty(x.shape) for x in (k, v)] + [packed.new_empty(x.shape) for x in (igate_preact, fgate_preact)]
    return *grads, *(_no_state(packed, 2) if C_initial is None else _fake_state(problem, packed)[:2])


def _setup_state_context(ctx, inputs, output):
    k, v, igate_preact, fgate_preact, document_start, C_initial, n_initial, _, gate, normaliser = inputs
    *_, packed, chunk_decay = output
    ctx.settings = (gate, normaliser)
    ctx.save_for_backward(
        k, v, igate_preact, fgate_preact, document_start, C_initial, n_initial, packed, chunk_decay
    )  # fmt: skip
    ctx.set_materialize_grads(False)


def _state_backward(ctx, grad_C, grad_n, *_):
    k, v, igate_preact, fgate_preact, document_start, C_initial, n_initial, packed, chunk_decay = ctx.saved_tensors
    gates = (igate_preact, fgate_preact)
    grads = mlstm_chunkwise_state_backward(
        *_without_gaps(grad_C, grad_n, k, v), k, v, *gates, document_start, C_initial, n_initial, packed, chunk_decay,
        *ctx.settings,
    )  # fmt: skip
    return *_as_inputs((None, *grads), *gates, C_initial, n_initial)[1:], None, None


mlstm_chunkwise_state.register_autograd(_state_backward, setup_context=_setup_state_context)
