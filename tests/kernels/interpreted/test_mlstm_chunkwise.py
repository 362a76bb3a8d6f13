"""The Triton mLSTM against the reference in float64 on the same (rounded) inputs: outputs, states, all gradients.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension of a head.
"""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from kernels.mlstm import CellSettings, MLSTMState, mlstm, mlstm_state
from kernels.mlstm.chunkwise import launch, op, tiles
from tests.kernels.cases import assert_close, relative_error
from tests.kernels.mlstm_cases import GATE_KINDS, INPUT_NAMES, REGIMES, gates, mlstm_chunkwise
from tests.kernels.mlstm_chain import run_chain
from tests.kernels.mlstm_rounded import mlstm_rounded
from tests.kernels.triton_cases import COMPILED, DTYPES, compiled_only, far_heads, padded, strided

# Relative to the norm of each tensor (docs/kernels.md). Where a PyTorch computation with the same roundings
# (mlstm_rounded.py) is further off than a limit, the kernels may be NEAR_ROUNDED times as far off as it is.
NEAR_ROUNDED = 1.2
EXACT = {"d fgate_preact": 1e-4}
SIXTEEN_BIT = {"h": 4e-3, "C": 4e-3, "n": 1e-4, "d fgate_preact": 1e-2}

# (B, S, NH, DK, DV): on a CPU as small as shows every edge of a chunk of 64 tokens and of tiles of 32 and 16.
SHAPES = [(1, 150, 2, 32, 48), (1, 1, 1, 16, 32), (1, 65, 1, 48, 96)]
SHAPES_COMPILED = [
    *SHAPES,
    *((2, length, 3, 64, 128) for length in (1, 2, 15, 16, 63, 64, 65, 127, 128, 129, 1000)),
    *((1, 300, 4, *dims) for dims in [(16, 32), (48, 96), (128, 256), (192, 384), (256, 512), (256, 256), (384, 384)]),
    (3, 700, 1, 512, 512),
    (1, 4096, 8, 128, 256),
    (1, 8192, 2, 256, 512),
]
# Head dimensions that have tiles of their own on some GPU; with few sequences and with many.
TUNED_DIMS = sorted({place[:2] for path in tiles.TABLES.glob("*.json") for place in tiles.tuned(path.stem)})
SHAPES_COMPILED += [(batch, 300, 4, *dims) for dims in TUNED_DIMS for batch in (1, tiles.FEW_SEQUENCES // 4 + 1)]

# What must be equal bit for bit does not depend on the precision of the interpreter.
bitwise = pytest.mark.parametrize("dtype", DTYPES if COMPILED else DTYPES[:1], ids=str)


def tolerances(expected, dtype, rounded=None):
    special, other = (EXACT, 1e-5) if dtype == torch.float32 else (SIXTEEN_BIT, 6e-3)
    limits = {name: special.get(name, other) for name in expected}
    if rounded is not None:
        near = {name: NEAR_ROUNDED * relative_error(rounded[name], expected[name]) for name in expected}
        limits = {name: max(limits[name], near[name]) for name in expected}
    return limits


def make_inputs(shape, dtype, device, regime="random", seed=0):
    batch, length, heads, key_dim, value_dim = shape
    torch.manual_seed(seed)
    # A common part of queries and keys keeps n^T q away from zero, where no finite precision could divide by it. It
    # cancels in their gradients, at a cost in digits: with few of them, a smaller one does, but for extreme gates.
    common = 1 if dtype == torch.float32 or regime != "random" else 0.25
    q, k = (common + torch.randn(batch, length, heads, key_dim) for _ in range(2))
    v = torch.randn(batch, length, heads, value_dim)
    inputs = [x.to(dtype) for x in (q, k, v)] + list(gates(regime, batch, length, heads))
    return [x.to(device).requires_grad_() for x in inputs]


def make_state(shape, device, gate="exp"):
    batch, _, heads, key_dim, value_dim = shape
    torch.manual_seed(1)
    parts = [torch.randn(batch, heads, key_dim, value_dim), torch.randn(batch, heads, key_dim)]
    m = torch.randn(batch, heads) if gate == "exp" else torch.zeros(batch, heads)
    return MLSTMState(*(x.to(device).requires_grad_() for x in parts), m.to(device))


def make_starts(shape, device, share=0.04):
    """Random starts, and some at the edges of chunks of 64 and 128 tokens."""
    torch.manual_seed(2)
    starts = torch.rand(shape[:2]) < share
    for place in (63, 64, 127, 128, shape[1] - 1):
        starts[:, place : place + 1] |= torch.rand(shape[0], 1) < 0.6
    return starts.to(device)


def double(x):
    return x.detach().double().requires_grad_(x.requires_grad)


def run(cell, inputs, state, dtype, **settings):
    """Outputs and all gradients of a weighted sum of the outputs, by name; the weights are numbers of `dtype`."""
    result = cell(*inputs, initial_state=state, **settings)
    h, final = result if isinstance(result, tuple) else (None, result)
    parts = {"h": h} | ({} if final is None else {"C": final.C, "n": final.n})
    vector = settings.get("normaliser", True)
    outputs = {name: x for name, x in parts.items() if x is not None and (vector or name != "n")}
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in outputs.values()]
    wanted = dict(zip(INPUT_NAMES[-len(inputs) :], inputs, strict=True))
    if state is not None:
        wanted |= {"initial C": state.C} | ({"initial n": state.n} if vector else {})
    grads = torch.autograd.grad(list(outputs.values()), list(wanted.values()), weights, materialize_grads=True)
    if final is not None:
        outputs["m"] = final.m
    return {name: x.detach() for name, x in outputs.items()} | {
        f"d {name}": grad for name, grad in zip(wanted, grads, strict=True)
    }


def triton_cell(*inputs, **settings):
    return mlstm(*inputs, backend="triton", **settings)


def compare(inputs, state, **settings):
    dtype = inputs[0].dtype
    actual = run(triton_cell, inputs, state, dtype, **settings)
    settings.pop("keep_chunk_states", None)
    doubles = None if state is None else MLSTMState(*(double(x) for x in (state.C, state.n, state.m)))
    expected = run(mlstm_chunkwise, [double(x) for x in inputs], doubles, dtype, **settings)
    rounded = run(mlstm_rounded, inputs, state, dtype, **settings)
    assert_close(actual, expected, tolerances(expected, dtype, rounded))


def triton_chain(cuts):
    """The cell as a chain of slices, in the form that `run` takes."""

    def cell(*inputs, initial_state, document_start=None, return_state=True, gate="exp", normaliser=True):
        length = inputs[0].shape[1]
        edges = [0, *cuts, length]
        tensors = [*inputs, document_start]
        slices = [
            [None if x is None else x[:, begin:end] for x in tensors]
            for begin, end in zip(edges, edges[1:], strict=False)
        ]
        h, state, gradients = run_chain(slices, initial_state, CellSettings(gate, normaliser), "triton")
        return _Chained.apply(gradients, h, state.C, state.n, *inputs, initial_state.C, initial_state.n), state.m

    def as_cell(*inputs, **settings):
        (h, C, n), m = cell(*inputs, **settings)
        return h, MLSTMState(C, n, m)

    return as_cell


class _Chained(torch.autograd.Function):
    """Outputs of a chain with its gradients as those of the whole inputs."""

    @staticmethod
    def forward(ctx, gradients, h, C, n, *_):
        ctx.gradients = gradients
        return h.detach().clone(), C.detach().clone(), n.detach().clone()

    @staticmethod
    def backward(ctx, *grads):
        with torch.enable_grad():
            return None, None, None, None, *ctx.gradients(*grads)


@pytest.mark.parametrize("shape", SHAPES_COMPILED if COMPILED else SHAPES, ids=str)
def test_shapes(shape, dtype, device):
    inputs = make_inputs(shape, dtype, device)
    if shape[1] <= 2:
        # Read-outs at the normaliser's floor: above it, the gradient of a lone token's query is zero but for eps.
        inputs[3].data -= 4
    compare(inputs, None)


@pytest.mark.parametrize("shape", [(2, 100, 1, 32, 48), *([(2, 700, 2, 256, 512)] if COMPILED else [])], ids=str)
@pytest.mark.parametrize(("gate", "normaliser"), GATE_KINDS)
def test_slices_that_pass_gradients_back(shape, gate, normaliser, dtype, device):
    if not COMPILED and (dtype != torch.float32 or (gate, normaliser) == ("sigmoid", True)):
        pytest.skip("the interpreter is slow: one precision, with all of the memory and with the least")
    inputs, state, starts = (
        make_inputs(shape, dtype, device),
        make_state(shape, device, gate),
        make_starts(shape, device),
    )
    settings = {"document_start": starts, "return_state": True, "gate": gate, "normaliser": normaliser}
    actual = run(triton_chain([shape[1] // 3, 2 * shape[1] // 3 + 1]), inputs, state, dtype, **settings)
    doubles = MLSTMState(*(double(x) for x in (state.C, state.n, state.m)))
    expected = run(mlstm_chunkwise, [double(x) for x in inputs], doubles, dtype, **settings)
    rounded = run(mlstm_rounded, inputs, state, dtype, **settings)
    assert_close(actual, expected, tolerances(expected, dtype, rounded))


@pytest.mark.parametrize("shape", [(2, 100, 1, 32, 48), *([(2, 700, 2, 256, 512)] if COMPILED else [])], ids=str)
@pytest.mark.parametrize(("gate", "normaliser"), GATE_KINDS)
def test_states_and_documents(shape, gate, normaliser, dtype, device):
    if not COMPILED and dtype == torch.float16 and gate == "sigmoid":
        pytest.skip("the gates are computed in float32 in any case")
    inputs, state = make_inputs(shape, dtype, device), make_state(shape, device, gate)
    starts = make_starts(shape, device)
    settings = {"gate": gate, "normaliser": normaliser, "return_state": True}
    if COMPILED:
        compare(inputs, state, **settings)
    compare(inputs, state, document_start=starts, keep_chunk_states=True, **settings)


@pytest.mark.parametrize("regime", [regime for regime in REGIMES if regime != "random"])
def test_gate_regimes(regime, dtype, device):
    shape = (2, 1000, 4, 128, 256) if COMPILED else (1, 140, 1, 16, 32)
    if dtype == torch.float16 and regime in ("initialisation", "strong forgetting"):
        pytest.skip("read-outs of about exp(-10), or gradients of states of exp(-15), are below the range of float16")
    compare(make_inputs(shape, dtype, device, regime), None, document_start=make_starts(shape, device, 0.01))


@pytest.mark.parametrize("igate", [-torch.inf, 0.0, 1e4])
@pytest.mark.parametrize("fgate", [-torch.inf, -1e4, torch.inf])
def test_extreme_gates_stay_finite(fgate, igate, device):
    shape = (1, 70, 1, 16, 16)
    inputs, state = make_inputs(shape, torch.float32, device), make_state(shape, device)
    with torch.no_grad():
        inputs[3].fill_(igate)
        inputs[4].fill_(fgate)
    starts = torch.zeros(shape[:2], dtype=torch.bool, device=device)
    starts[:, 5] = True
    results = run(triton_cell, inputs, state, torch.float32, document_start=starts, return_state=True)
    assert all(value.isfinite().all() for value in results.values())
    assert igate > -torch.inf or not results["h"][:, 5:].any()


@pytest.mark.parametrize("shut", [-torch.inf, -1e30])
def test_shut_gates_among_ordinary_ones(shut, device):
    inputs = make_inputs((1, 70, 2, 16, 16), torch.float32, device)
    with torch.no_grad():
        inputs[3][:, 12], inputs[4][:, [20, 65]] = shut, shut
    compare(inputs, None, return_state=True)


@pytest.mark.parametrize(("gate", "normaliser"), GATE_KINDS)
def test_memory_of_many_chunks(gate, normaliser, dtype, device):
    """Forget gates so open that hundreds of tokens, or thousands, are remembered: no error may grow with the chunks."""
    if not COMPILED and dtype == torch.float16 and gate == "sigmoid":
        pytest.skip("the gates are computed in float32 in any case")
    shape = (1, 8192, 2, 256, 512) if COMPILED else (1, 600, 1, 16, 16)
    q, k, v, igate, fgate = make_inputs(shape, dtype, device)
    igate, fgate = (x.detach().mul(0.5).add(bias).requires_grad_() for x, bias in ((igate, -3), (fgate, 6)))
    compare([q, k, v, igate, fgate], None, gate=gate, normaliser=normaliser)


def test_documents_at_every_token(device, dtype):
    inputs = make_inputs((1, 70, 1, 16, 16), dtype, device)
    inputs[3].data -= 3
    compare(inputs, None, document_start=torch.ones(1, 70, dtype=torch.bool, device=device))


@bitwise
def test_an_earlier_document_changes_no_bit_of_a_later_one(device, dtype):
    shape = (1, 150, 2, 32, 48) if COMPILED else (1, 150, 1, 32, 48)
    boundary = 70
    starts = torch.zeros(shape[:2], dtype=torch.bool, device=device)
    starts[:, [3, 64, boundary]] = True
    results = []
    for seed in (0, 1):
        inputs = make_inputs(shape, dtype, device, seed=0)
        with torch.no_grad():
            for x, other in zip(inputs, make_inputs(shape, dtype, device, seed=seed), strict=True):
                x[:, :boundary] = other[:, :boundary]
        state = make_state(shape, device)
        results.append(run(triton_cell, inputs, state, dtype, document_start=starts, return_state=True))
    for name in ("h", "d q", "d k", "d v", "d igate_preact", "d fgate_preact"):
        assert torch.equal(results[0][name][:, boundary:], results[1][name][:, boundary:]), name
        assert not torch.equal(results[0][name][:, :boundary], results[1][name][:, :boundary]), name
    for name in ("C", "n", "m"):
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.parametrize("length", [64, 90])
def test_two_halves_equal_one_pass(length, device):
    shape = (1, 130, 1, 32, 48)

    def halves(q, k, v, igate_preact, fgate_preact, *, initial_state):
        inputs = (q, k, v, igate_preact, fgate_preact)
        first, state = triton_cell(*(x[:, :length] for x in inputs), initial_state=initial_state, return_state=True)
        second, state = triton_cell(*(x[:, length:] for x in inputs), initial_state=state, return_state=True)
        return torch.cat([first, second], dim=1), state

    inputs, state = make_inputs(shape, torch.float32, device), make_state(shape, device)
    whole = run(triton_cell, inputs, state, torch.float32, return_state=True)
    parts = run(halves, inputs, state, torch.float32)
    assert_close(parts, whole, tolerances(whole, torch.float32))


def test_state_alone_equals_the_state_of_a_pass(device, dtype):
    shape = (1, 130, 2, 32, 48)
    inputs, state = make_inputs(shape, dtype, device)[1:], make_state(shape, device)
    settings = {"document_start": make_starts(shape, device, 0.01)}

    def triton_state(*inputs, **settings):
        return mlstm_state(*inputs, backend="triton", **settings).state

    def reference_state(*inputs, **settings):
        return mlstm_state(*inputs, **settings).state

    actual = run(triton_state, inputs, state, dtype, **settings)
    doubles = MLSTMState(*(double(x) for x in (state.C, state.n, state.m)))
    expected = run(reference_state, [double(x) for x in inputs], doubles, dtype, **settings)
    assert_close(actual, expected, tolerances(expected, dtype))


def test_without_normaliser_there_is_no_n(device):
    inputs, settings = make_inputs((1, 5, 1, 16, 16), torch.float32, device), {"gate": "sigmoid", "normaliser": False}
    _, state = triton_cell(*inputs, initial_state=make_state((1, 5, 1, 16, 16), device), return_state=True, **settings)
    assert not state.n.any() and not mlstm_state(*inputs[1:], backend="triton", **settings).state.n.any()


@bitwise
def test_is_deterministic_and_takes_rows_of_a_batch_alone(device, dtype):
    shape = (2, 70, 2, 32, 48)
    inputs = make_inputs(shape, dtype, device)
    first, again = (triton_cell(*inputs)[0] for _ in range(2))
    assert torch.equal(first, again)
    alone = triton_cell(*(x[1:2] for x in inputs))[0]
    assert torch.equal(alone, first[1:2])


@bitwise
def test_reads_nothing_outside_its_inputs(device, dtype):
    shape = (2, 70, 2, 32, 48)
    inputs = make_inputs(shape, dtype, device)
    plain = run(triton_cell, inputs, None, dtype)
    for place in (padded, strided):
        placed = run(triton_cell, [place(x) for x in inputs], None, dtype)
        for name, expected in plain.items():
            assert torch.equal(placed[name], expected), (place, name)


def test_an_empty_batch_has_empty_results(device):
    inputs = make_inputs((0, 5, 2, 16, 32), torch.float32, device)
    results = run(lambda *x, **settings: (triton_cell(*x, **settings)[0].sum(), None), inputs, None, torch.float32)
    assert results["h"] == 0 and results["d v"].shape == (0, 5, 2, 32)


def test_heads_of_one_number_may_have_any_stride(device):
    inputs = make_inputs((2, 5, 3, 1, 1), torch.float32, device)
    # PyTorch calls these contiguous, whatever the stride of their last axis.
    turned = [x.detach().mT.clone(memory_format=torch.contiguous_format).mT.requires_grad_() for x in inputs[:3]]
    assert turned[0].is_contiguous() and turned[0].stride(-1) == 3
    expected = run(triton_cell, inputs, None, torch.float32)
    actual = run(triton_cell, [*turned, *inputs[3:]], None, torch.float32)
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


def test_heads_may_be_far_apart(device):
    """As in a layout with heads before tokens, where an offset within one sequence passes 2^31 elements."""
    inputs = make_inputs((1, 3, 3, 16, 16), torch.float16, device)
    expected = run(triton_cell, inputs, None, torch.float16)
    actual = run(triton_cell, [*map(far_heads, inputs[:3]), *inputs[3:]], None, torch.float16)
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


@bitwise
def test_keeping_chunk_states_changes_no_bit(device, dtype):
    inputs = make_inputs((1, 70, 2, 32, 48), dtype, device)
    results = [run(triton_cell, inputs, None, dtype, keep_chunk_states=keep) for keep in (False, True)]
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


def test_is_a_well_behaved_operator(device):
    shape = (1, 70, 2, 16, 32)
    inputs, state = make_inputs(shape, torch.float32, device), make_state(shape, device)
    starts = make_starts(shape, device)
    cell = (*inputs, starts, state.C, state.n, state.m, "exp", True, 1e-6, True, True)
    torch.library.opcheck(op.mlstm_chunkwise.definition, cell)
    # Of what there is not, and of one chunk.
    few = make_inputs((1, 5, 2, 16, 16), torch.float32, device)
    cell = (*few, None, None, None, None, "sigmoid", True, 1e-6, False, False)
    torch.library.opcheck(op.mlstm_chunkwise.definition, cell)
    alone = (*inputs[1:], starts, state.C, state.n, state.m, "exp", True, 1e-6)
    torch.library.opcheck(op.mlstm_chunkwise_state.definition, alone)
    with torch.no_grad():
        C, n, _, *kept = op.mlstm_chunkwise_state.definition(*alone)
    # The gradient of a state that was transposed.
    backward = (C.mT.contiguous().mT, n, *alone[:8], *kept, "exp", True, 1e-6)
    backward = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in backward)
    torch.library.opcheck(op.mlstm_chunkwise_state_backward.definition, backward)


def test_other_sizes_are_traced_by_symbols(device, monkeypatch):
    """torch.compile takes a size that changes for a symbol: after the first, one graph for any batch and length."""
    monkeypatch.setattr(tiles, "FEW_SEQUENCES", 2)
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return aot_eager(graph, examples)

    compiled = torch.compile(triton_cell, fullgraph=True, backend=backend)
    for batch, length in [(2, 66), (3, 70), (4, 68)]:
        inputs = make_inputs((batch, length, 1, 16, 16), torch.float32, device)
        actual = run(compiled, inputs, None, torch.float32)
    assert len(graphs) <= 2
    expected = run(triton_cell, inputs, None, torch.float32)
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


@bitwise
def test_activation_checkpointing_keeps_chunk_states_and_changes_no_bit(device, dtype, monkeypatch):
    inputs = make_inputs((1, 70, 2, 16, 32), dtype, device)
    recurrences = []
    states = launch.states

    def counted(*args, backwards=False, **settings):
        recurrences.append("backwards" if backwards else "forwards")
        return states(*args, backwards=backwards, **settings)

    monkeypatch.setattr(launch, "states", counted)

    def checkpointed(*inputs, **settings):
        return checkpoint(triton_cell, *inputs, use_reentrant=False, **settings)

    plain = run(triton_cell, inputs, None, dtype)
    assert recurrences == ["forwards", "backwards"]
    recurrences.clear()
    leaner = run(triton_cell, inputs, None, dtype, keep_chunk_states=False)
    assert recurrences == ["forwards", "forwards", "backwards"]
    recurrences.clear()
    again = run(checkpointed, inputs, None, dtype)
    assert recurrences == ["forwards", "forwards", "backwards"], "the second run's states serve the backward pass"
    for name, expected in plain.items():
        assert torch.equal(again[name], expected) and torch.equal(leaner[name], expected), name


@compiled_only
def test_compiles_as_one_graph_and_captures_in_a_cuda_graph(device):
    inputs = make_inputs((2, 300, 2, 64, 128), torch.bfloat16, device)
    expected = run(triton_cell, inputs, None, torch.bfloat16)
    compiled = torch.compile(triton_cell, fullgraph=True)
    actual = run(compiled, inputs, None, torch.bfloat16)
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name
    static = [x.detach() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        triton_cell(*static)
        with torch.cuda.graph(graph):
            h, _ = triton_cell(*static)
    graph.replay()
    assert torch.equal(h, expected["h"])


@compiled_only
@pytest.mark.parametrize("dims", TUNED_DIMS, ids=str)
def test_the_cuts_for_few_and_for_many_sequences_give_the_same_bits(device, dims):
    shape = (tiles.FEW_SEQUENCES // 4 + 1, 700, 4, *dims)
    inputs = make_inputs(shape, torch.bfloat16, device)
    starts = make_starts(shape, device)
    weights = torch.randn(*shape[:3], dims[1], device=device, dtype=torch.bfloat16)

    def all_results(batch):
        here = [x[batch].detach().requires_grad_() for x in inputs]
        h, _ = triton_cell(*here, document_start=starts[batch])
        return [h, *torch.autograd.grad(h, here, weights[batch])]

    for many, few in zip(all_results(slice(None)), all_results(slice(1, 2)), strict=True):
        assert torch.equal(many[1:2], few)


@compiled_only
def test_other_lengths_and_batches_compile_nothing_anew(device):
    from kernels.mlstm.chunkwise import launch_backward

    kernels = [x for m in (launch, launch_backward) for name, x in vars(m).items() if name.endswith("_kernel")]

    def variants():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def run_all(sizes):
        for batch, length in sizes:
            run(triton_cell, make_inputs((batch, length, 2, 64, 128), torch.bfloat16, device), None, torch.bfloat16)

    # Of tuned head dimensions there is a cut for few sequences and one for many.
    run_all([(1, 160), (tiles.FEW_SEQUENCES, 160)])
    before = variants()
    run_all([(3, 160), (1, 1), (2, 1000), (tiles.FEW_SEQUENCES // 2, 70), (16, 333), (40, 33)])
    assert variants() == before


@compiled_only
def test_states_beyond_two_to_the_31_elements(device):
    shape = (16, 8192, 8, 256, 512)
    torch.manual_seed(0)
    q, k = (torch.randn(*shape[:4], device=device, dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(*shape[:3], shape[4], device=device, dtype=torch.bfloat16)
    igate, fgate = (torch.randn(*shape[:3], device=device) for _ in range(2))
    inputs = (q, k, v, igate, fgate + 3)
    h, _ = triton_cell(*inputs, keep_chunk_states=True)
    alone, _ = triton_cell(*(x[15:] for x in inputs), keep_chunk_states=True)
    assert torch.equal(h[15:], alone)
