"""The chunkwise mLSTM as operators, so that torch.compile and checkpointing see single operations.

Two operators with gradients: `mlstm_chunkwise`, the whole cell, and `mlstm_chunkwise_state`, the state behind the last
token alone.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension, BH batch times heads, NC chunks, L tokens of
a chunk, SP = NC * L.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.mlstm.accounting import WEIGHT_ROWS
from kernels.mlstm.border import SliceEnd
from kernels.mlstm.chunkwise import launch, launch_backward
from kernels.mlstm.chunkwise.gates import ADDED
from kernels.mlstm.chunkwise.launch import Ends, Factors, States, nothing
from kernels.mlstm.chunkwise.launch_backward import Reading
from kernels.mlstm.chunkwise.problem import Documents, Problem
from kernels.mlstm.chunkwise.read_out import MATRIX_WEIGHT, VECTOR_WEIGHT
from kernels.mlstm.inputs import CellGradients, CellInputs, CellSettings
from kernels.mlstm.state import NOTHING
from kernels.operators import Layout, operator


class Kept(NamedTuple):
    """What the backward pass needs of the forward one.

    packed weights [7, BH, SP], chunk decays [BH, NC] and query normaliser [BH, SP], float32; and the states that enter
    the chunks, None where they are to be computed again: matrices [BH, NC, DK, DV] in k's dtype and vectors
    [BH, NC, DK] float32.
    """

    packed: Tensor
    chunk_decay: Tensor
    query_normaliser: Tensor
    matrices: Tensor | None
    vectors: Tensor | None


class CellResults(NamedTuple):
    """h [B, S, NH, DV]; C, n, m behind the last token (empty unless return_state); parts of Kept, empty for None."""

    h: Tensor
    C: Tensor
    n: Tensor
    m: Tensor
    packed: Tensor
    chunk_decay: Tensor
    query_normaliser: Tensor
    matrices: Tensor
    vectors: Tensor


@operator("mlstm_chunkwise")
def mlstm_chunkwise(
    q: Tensor, inputs: CellInputs, settings: CellSettings, return_state: bool, keep_chunk_states: bool
) -> CellResults:
    """The cell; inputs with a contiguous last axis, contiguous gates."""
    with torch.cuda.device_of(q):
        problem = Problem.of(inputs, settings)
        documents = Documents.of(inputs.document_start)
        packed, chunk_decay, m = launch.weights(problem, inputs, documents, 0.0)
        factors = Factors(inputs.k, inputs.v, packed[ADDED], packed[ADDED])
        states = launch.states(problem, factors, chunk_decay, _initial(inputs), store_after=return_state)
        matrices, vectors = states.at_chunks()
        scores, query_normaliser = launch.scores(problem, q, inputs.k, packed, vectors, documents)
        h = launch.read_out(problem, q, inputs.v, packed, query_normaliser, matrices, scores)
        if not keep_chunk_states:
            matrices, vectors = nothing(packed, 2)
        C, n, m = (*states.behind(), m) if return_state else nothing(packed, 3)
        return CellResults(h, C, n, m, packed, chunk_decay, query_normaliser, matrices, vectors)


@mlstm_chunkwise.fake
def _(
    q: Tensor, inputs: CellInputs, settings: CellSettings, return_state: bool, keep_chunk_states: bool
) -> CellResults:
    problem = Problem.of(inputs, settings)
    sequences, chunks = problem.sequences, problem.chunks
    packed = q.new_empty(WEIGHT_ROWS, sequences, problem.padded, dtype=torch.float32)
    C, n, m = _fake_state(problem, packed) if return_state else nothing(packed, 3)
    matrices, vectors = nothing(packed, 2)
    if keep_chunk_states:
        matrices = q.new_empty(sequences, chunks, problem.key_dim, problem.value_dim)
        vectors = packed.new_empty(sequences, chunks, problem.key_dim)
    h, decay = inputs.v.new_empty(inputs.v.shape), packed.new_empty(sequences, chunks)
    query_normaliser = packed.new_empty(sequences, problem.padded)
    return CellResults(h, C, n, m, packed, decay, query_normaliser, matrices, vectors)


@operator("mlstm_chunkwise_backward")
def mlstm_chunkwise_backward(
    grad_h: Tensor, grad_final: Ends, q: Tensor, inputs: CellInputs, h: Tensor, kept: Kept, settings: CellSettings
) -> CellGradients:
    """From the gradients of h and of the final state."""
    return cell_gradients(grad_h, grad_final, q, inputs, h, kept, settings)


def cell_gradients(
    grad_h: Tensor,
    grad_final: Ends,
    q: Tensor,
    inputs: CellInputs,
    h: Tensor,
    kept: Kept,
    settings: CellSettings,
    end: SliceEnd | None = None,
) -> CellGradients:
    """Launch the backward pass. `end`: where this is a slice whose state goes on to slices elsewhere, what adds their
    gradient to `grad_final`; it is asked late, so that what does not need it hides the exchange.
    """
    with torch.cuda.device_of(q):
        problem = Problem.of(inputs, settings)
        documents = Documents.of(inputs.document_start)
        has_initial = inputs.C_initial is not None
        packed, chunk_decay, query_normaliser, matrices, vectors = kept
        rows = launch_backward.row_weights(problem, h, grad_h, packed, query_normaliser)
        reads = Factors(q, grad_h, rows[MATRIX_WEIGHT], rows[VECTOR_WEIGHT])
        if end is not None:
            entered = launch.states(
                problem, reads, chunk_decay, grad_final, backwards=True, store_chunks=False, store_after=True
            )
            end.start_back(*entered.behind())
        entering = States(matrices, vectors, None, None)
        if matrices is None:
            factors = Factors(inputs.k, inputs.v, packed[ADDED], packed[ADDED])
            entering = launch.states(problem, factors, chunk_decay, _initial(inputs))
        scores, grad_scores, sums = launch_backward.score_gradients(problem, q, inputs, grad_h, packed, rows, documents)
        if end is not None:
            grad_final = Ends(*end.leaving_gradient(*grad_final))
        leaving = launch.states(problem, reads, chunk_decay, grad_final, backwards=True, store_after=has_initial)
        reading = Reading(q, grad_h, rows, scores, grad_scores)
        tokens = launch_backward.token_gradients(problem, inputs, reading, packed, chunk_decay, entering, leaving)
        del entering
        grad_gates = launch_backward.gate_gradients(problem, sums, tokens, inputs, documents)
        assert tokens.q is not None
        grad_initial = leaving.behind() if has_initial else nothing(packed, 2)
        return CellGradients(tokens.q, tokens.k, tokens.v, *grad_gates, *grad_initial)


@mlstm_chunkwise_backward.fake
def _(
    grad_h: Tensor, grad_final: Ends, q: Tensor, inputs: CellInputs, h: Tensor, kept: Kept, settings: CellSettings
) -> CellGradients:
    return CellGradients(q.new_empty(q.shape), *_fake_gradients(inputs, settings))


# q, the inputs, h and what the backward pass needs besides.
_SAVED = Layout(Tensor, CellInputs, Tensor, Kept)


def _keep(ctx: Any, arguments: list[Any], results: CellResults) -> None:
    q, inputs, ctx.settings, ctx.return_state, ctx.keep_chunk_states = arguments
    ctx.save_for_backward(q, *inputs, results.h, *results[CellResults._fields.index("packed") :])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grads: CellResults) -> tuple[Tensor | None, CellInputs]:
    q, inputs, h, kept = _SAVED.parts(ctx.saved_tensors)
    if not ctx.keep_chunk_states:
        kept = kept._replace(matrices=None, vectors=None)
    grad_h = torch.zeros_like(h) if grads.h is None else grads.h
    # Without return_state, those of the empty tensors in the state's place.
    grad_final = Ends(grads.C, grads.n) if ctx.return_state else Ends(None, None)
    if any(grad is not None for grad in grad_final):
        grad_final = without_gaps(grad_final, inputs)
    found = mlstm_chunkwise_backward(readable(grad_h.to(h.dtype)), grad_final, q, inputs, h, kept, ctx.settings)
    return found.q, _as_inputs(found, inputs)


mlstm_chunkwise.differentiate(_keep, _differentiate)


class StateResults(NamedTuple):
    """C, n and m behind the last token, and for the backward pass the packed weights and the chunk decays."""

    C: Tensor
    n: Tensor
    m: Tensor
    packed: Tensor
    chunk_decay: Tensor


class StateGradients(NamedTuple):
    """Of the inputs of these names; of the initial state empty where there is none."""

    k: Tensor
    v: Tensor
    igate_preact: Tensor
    fgate_preact: Tensor
    C_initial: Tensor
    n_initial: Tensor


@operator("mlstm_chunkwise_state")
def mlstm_chunkwise_state(inputs: CellInputs, settings: CellSettings) -> StateResults:
    """Without an initial state, of the tokens alone: m begins below that of any token."""
    with torch.cuda.device_of(inputs.k):
        problem = Problem.of(inputs, settings)
        documents = Documents.of(inputs.document_start)
        packed, chunk_decay, m = launch.weights(problem, inputs, documents, NOTHING)
        factors = Factors(inputs.k, inputs.v, packed[ADDED], packed[ADDED])
        states = launch.states(problem, factors, chunk_decay, _initial(inputs), store_chunks=False, store_after=True)
        return StateResults(*states.behind(), m, packed, chunk_decay)


@mlstm_chunkwise_state.fake
def _(inputs: CellInputs, settings: CellSettings) -> StateResults:
    problem = Problem.of(inputs, settings)
    packed = inputs.k.new_empty(WEIGHT_ROWS, problem.sequences, problem.padded, dtype=torch.float32)
    C, n, m = _fake_state(problem, packed)
    return StateResults(C, n, m, packed, packed.new_empty(problem.sequences, problem.chunks))


@operator("mlstm_chunkwise_state_backward")
def mlstm_chunkwise_state_backward(
    grad_final: Ends, inputs: CellInputs, packed: Tensor, chunk_decay: Tensor, settings: CellSettings
) -> StateGradients:
    """From the gradients of the state."""
    with torch.cuda.device_of(inputs.k):
        problem = Problem.of(inputs, settings)
        documents = Documents.of(inputs.document_start)
        has_initial = inputs.C_initial is not None
        unread = torch.zeros_like(packed[ADDED])
        factors = Factors(inputs.k, inputs.v, packed[ADDED], packed[ADDED])
        entering = launch.states(problem, factors, chunk_decay, _initial(inputs))
        # Without a read-out, the gradient of the memory only decays from chunk to chunk.
        factors = Factors(inputs.k, inputs.v, unread, unread)
        leaving = launch.states(problem, factors, chunk_decay, grad_final, backwards=True, store_after=has_initial)
        no_sums = packed.new_zeros(2, problem.sequences, problem.padded)
        tokens = launch_backward.token_gradients(problem, inputs, None, packed, chunk_decay, entering, leaving)
        grad_gates = launch_backward.gate_gradients(problem, no_sums, tokens, inputs, documents)
        grad_initial = leaving.behind() if has_initial else nothing(packed, 2)
        return StateGradients(tokens.k, tokens.v, *grad_gates, *grad_initial)


@mlstm_chunkwise_state_backward.fake
def _(
    grad_final: Ends, inputs: CellInputs, packed: Tensor, chunk_decay: Tensor, settings: CellSettings
) -> StateGradients:
    return _fake_gradients(inputs, settings)


# The inputs, packed weights and chunk decays.
_SAVED_OF_STATE = Layout(CellInputs, Tensor, Tensor)


def _keep_of_state(ctx: Any, arguments: list[Any], results: StateResults) -> None:
    inputs, ctx.settings = arguments
    ctx.save_for_backward(*inputs, results.packed, results.chunk_decay)
    ctx.set_materialize_grads(False)


def _differentiate_state(ctx: Any, grads: StateResults) -> tuple[CellInputs]:
    inputs, packed, chunk_decay = _SAVED_OF_STATE.parts(ctx.saved_tensors)
    grad_final = without_gaps(Ends(grads.C, grads.n), inputs)
    found = mlstm_chunkwise_state_backward(grad_final, inputs, packed, chunk_decay, ctx.settings)
    return (_as_inputs(found, inputs),)


mlstm_chunkwise_state.differentiate(_keep_of_state, _differentiate_state)


def readable(x: Tensor) -> Tensor:
    """x as the kernels can read it: the last axis contiguous, no axis expanded."""
    # Not x.contiguous(), which leaves the strides of what is empty, or of an axis of one element, as they are.
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.clone(memory_format=torch.contiguous_format)


def _initial(inputs: CellInputs) -> Ends:
    return Ends(inputs.C_initial, inputs.n_initial)


def without_gaps(grad: Ends, inputs: CellInputs) -> Ends:
    """Gradients of the final state; zero where there is none."""
    k, v = inputs.k, inputs.v
    batch, _, heads, key_dim = k.shape
    grad_C, grad_n = grad
    if grad_C is None:
        grad_C = k.new_zeros(batch, heads, key_dim, v.shape[-1], dtype=torch.float32)
    if grad_n is None:
        grad_n = k.new_zeros(batch, heads, key_dim, dtype=torch.float32)
    return Ends(grad_C, grad_n)


def _as_inputs(found: CellGradients | StateGradients, inputs: CellInputs) -> CellInputs:
    """Gradients in the inputs' precision."""
    C_initial, n_initial = inputs.C_initial, inputs.n_initial
    return CellInputs(
        k=found.k,
        v=found.v,
        igate_preact=found.igate_preact.to(inputs.igate_preact.dtype),
        fgate_preact=found.fgate_preact.to(inputs.fgate_preact.dtype),
        document_start=None,
        C_initial=None if C_initial is None else found.C_initial.to(C_initial.dtype),
        n_initial=None if n_initial is None else found.n_initial.to(n_initial.dtype),
        m_initial=None,
    )


def _fake_state(problem: Problem, like: Tensor) -> list[Tensor]:
    by_head = (problem.batch, problem.heads)
    return [
        like.new_empty(*by_head, problem.key_dim, problem.value_dim),
        like.new_empty(*by_head, problem.key_dim),
        like.new_empty(*by_head),
    ]


def _fake_gradients(inputs: CellInputs, settings: CellSettings) -> StateGradients:
    gates = [gate.new_empty(gate.shape, dtype=torch.float32) for gate in (inputs.igate_preact, inputs.fgate_preact)]
    like = gates[0]
    initial = nothing(like, 2)
    if inputs.C_initial is not None:
        initial = _fake_state(Problem.of(inputs, settings), like)[:2]
    return StateGradients(inputs.k.new_empty(inputs.k.shape), inputs.v.new_empty(inputs.v.shape), *gates, *initial)
