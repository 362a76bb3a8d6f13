"""The fused mLSTM step against the reference in float64. Axes: B batch, NH heads, DK, DV head dimensions."""

import pytest
import torch

from kernels.mlstm import MLSTMState
from kernels.mlstm.step import MAX_KEY_DIM, DecodingState, mlstm_step
from tests.kernels.cases import assert_close
from tests.kernels.mlstm_cases import mlstm_recurrent
from tests.kernels.triton_cases import COMPILED, DEVICE, compiled_only, padded, strided

B, NH = 2, 3
GATE_KINDS = pytest.mark.parametrize(("gate", "normaliser"), [("exp", True), ("sigmoid", True), ("sigmoid", False)])
SHAPES = [(16, 32), (48, 96), (64, 128), (128, 256), (192, 384), (256, 512), (512, 512), (20, 23)]
REGIMES = ["initialisation", "random", "saturated", "strong forgetting", "huge input gate", "all equal"]
# h is rounded to the dtype; the state is float32 always.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
STATE_TOLERANCE = 1e-6


def gates(regime, batch):
    i, f = torch.randn(batch, NH), torch.randn(batch, NH)
    return {
        "initialisation": (i * 0.01 - 10, f * 0.01 + torch.linspace(3, 6, NH)),
        "random": (2 * i, 2 * f),
        "saturated": (15 * i.sign(), 15 * f.sign()),
        "strong forgetting": (i, f - 15),
        "huge input gate": (i + 50, f + 4),
        "all equal": (torch.zeros_like(i), torch.zeros_like(f)),
    }[regime]


def make_inputs(dtype, key_dim=48, value_dim=96, regime="random", *, batch=B, seed=0):
    """q, k, v and the gates of one token; the gates are float32, as the model computes them."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(batch, NH, key_dim), torch.randn(batch, NH, key_dim), torch.randn(batch, NH, value_dim)
    return [x.to(DEVICE, dtype) for x in (q, k, v)] + [x.to(DEVICE) for x in gates(regime, batch)]


def make_state(key_dim=48, value_dim=96, gate="exp", *, batch=B, columns=None):
    torch.manual_seed(1)
    m = torch.randn(batch, NH) if gate == "exp" else torch.zeros(batch, NH)
    parts = torch.randn(batch, NH, key_dim, value_dim), torch.randn(batch, NH, key_dim), m
    return DecodingState.of(MLSTMState(*(part.to(DEVICE) for part in parts)), columns)


def copied(state, dtype=torch.float32):
    return DecodingState(*(part.detach().clone().to(dtype) for part in (state.C, state.n, state.m)))


def run(inputs, state, **kwargs):
    return {"h": mlstm_step(*inputs, state, **kwargs), **vars(state)}


def check(inputs, state, dtype, **kwargs):
    expected = run([x.double() for x in inputs], copied(state, torch.float64), backend="reference", **kwargs)
    before = [part.data_ptr() for part in (state.C, state.n, state.m)]
    actual = run(inputs, state, backend="triton", **kwargs)
    assert actual["h"].dtype == dtype and before == [part.data_ptr() for part in (state.C, state.n, state.m)]
    limits = {"h": TOLERANCES[dtype]} | dict.fromkeys(("C", "n", "m"), STATE_TOLERANCE)
    assert_close(actual, expected, limits)
    return actual["h"]


@GATE_KINDS
@pytest.mark.parametrize("regime", REGIMES)
def test_equals_the_reference_in_every_gate_regime(regime, gate, normaliser, dtype):
    check(make_inputs(dtype, regime=regime), make_state(gate=gate), dtype, gate=gate, normaliser=normaliser)


def test_gates_that_are_shut_empty_the_memory():
    inputs, state = make_inputs(torch.float32), make_state()
    shut = torch.full_like(inputs[3], -torch.inf)
    for _ in range(2):
        h = mlstm_step(*inputs[:3], shut, shut, state, backend="triton")
        assert not h.any() and not state.C.any() and not state.n.any()
    assert (state.m == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("key_dim, value_dim", SHAPES)
def test_any_head_dimension(key_dim, value_dim, dtype):
    check(make_inputs(dtype, key_dim, value_dim), make_state(key_dim, value_dim), dtype)


@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch(batch):
    check(make_inputs(torch.float32, batch=batch), make_state(batch=batch), torch.float32)


@GATE_KINDS
def test_many_steps_equal_the_recurrent_form(gate, normaliser):
    steps = 12
    tokens = [make_inputs(torch.float32, 20, 23, seed=seed) for seed in range(steps)]
    state = DecodingState.of(MLSTMState.empty(B, NH, 20, 23, device=DEVICE, dtype=torch.float32))
    kind = {"gate": gate, "normaliser": normaliser}
    h = torch.stack([mlstm_step(*token, state, backend="triton", **kind) for token in tokens], dim=1)
    whole = [torch.stack(parts, dim=1).double() for parts in zip(*tokens, strict=True)]
    expected, last = mlstm_recurrent(*whole, return_state=True, **kind)
    assert_close({"h": h, **vars(state.as_mlstm_state())}, {"h": expected, **vars(last)}, 3e-6)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_the_epsilon_counts(eps):
    check(make_inputs(torch.float32), make_state(), torch.float32, eps=eps)


@pytest.mark.parametrize("view", [padded, strided])
def test_inputs_may_be_strided(view):
    inputs = make_inputs(torch.float32)
    expected = mlstm_step(*inputs, make_state(), backend="triton")
    assert torch.equal(mlstm_step(*map(view, inputs), make_state(), backend="triton"), expected)


def test_a_sequence_does_not_depend_on_the_others():
    inputs, state = make_inputs(torch.float32), make_state()
    alone = DecodingState(*(part[1:].clone() for part in (state.C, state.n, state.m)))
    whole = mlstm_step(*inputs, state, backend="triton")
    assert torch.equal(mlstm_step(*(x[1:] for x in inputs), alone, backend="triton")[0], whole[1])
    assert torch.equal(alone.C[0], state.C[1]) and torch.equal(alone.n[0], state.n[1])


def test_gradients_are_not_tracked():
    inputs = [x.requires_grad_() for x in make_inputs(torch.float32)]
    for backend in ("reference", "triton"):
        state = make_state()
        assert not mlstm_step(*inputs, state, backend=backend).requires_grad and not state.C.requires_grad


def test_is_registered_with_torch():
    from kernels.mlstm import step_fused

    state = make_state(16, 16, batch=1)
    arguments = (*make_inputs(torch.float32, 16, 16, batch=1), state.C, state.n, state.m, "exp", True, 1e-6)
    torch.library.opcheck(step_fused.mlstm_step.definition, arguments)


def test_compiles_as_one_graph():
    inputs, state, other = make_inputs(torch.float32), make_state(), make_state()
    compiled = torch.compile(mlstm_step, fullgraph=True, backend="inductor" if COMPILED else "aot_eager")
    for _ in range(2):
        expected = mlstm_step(*inputs, other, backend="triton")
        assert torch.equal(compiled(*inputs, state, backend="triton"), expected)
        assert torch.equal(state.C, other.C) and torch.equal(state.m, other.m)


def test_what_it_cannot_do_is_refused():
    inputs = make_inputs(torch.float32)
    half = DecodingState(*(part.half() for part in vars(make_state()).values()))
    with pytest.raises(ValueError, match="mLSTM step backend 'triton' cannot do this: the state must be float32"):
        mlstm_step(*inputs, half, backend="triton")
    with pytest.raises(ValueError, match="a tensor is float64"):
        mlstm_step(*(x.double() for x in inputs), make_state(), backend="triton")
    wide = make_inputs(torch.float32, MAX_KEY_DIM + 1, 1)
    with pytest.raises(ValueError, match=f"key dimension {MAX_KEY_DIM + 1} is above {MAX_KEY_DIM}"):
        mlstm_step(*wide, make_state(MAX_KEY_DIM + 1, 1), backend="triton")


@pytest.mark.parametrize("columns", [16, 32, 64, 128])
def test_any_group_of_columns(columns):
    state = make_state(columns=columns)
    assert state.n.shape[2] == state.m.shape[2] == -(-96 // columns)
    check(make_inputs(torch.float32), state, torch.float32)
    # All groups hold the same numbers, bit for bit.
    assert torch.equal(state.n, state.n[:, :, :1].expand_as(state.n))
    assert torch.equal(state.m, state.m[:, :, :1].expand_as(state.m))


@pytest.mark.parametrize("columns", [0, 8, 24])
def test_other_groups_are_refused(columns):
    with pytest.raises(ValueError, match=f"columns must be a power of two of at least 16, not {columns}"):
        make_state(columns=columns)


@compiled_only
def test_many_steps_of_a_large_batch():
    # More programs than a GPU holds at a time, and every one of them many times over.
    inputs, state = make_inputs(torch.float32, 256, 512, batch=400), make_state(256, 512, batch=400)
    other = copied(state)
    for _ in range(20):
        h = mlstm_step(*inputs, state, backend="triton")
        expected = mlstm_step(*inputs, other, backend="reference")
    assert_close({"h": h, **vars(state)}, {"h": expected, **vars(other)}, 1e-5)


@compiled_only
def test_a_cuda_graph_repeats_the_step(dtype):
    inputs, state, other = make_inputs(dtype), make_state(), make_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mlstm_step(*inputs, copied(state), backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = mlstm_step(*inputs, state, backend="triton")
    for seed in range(5):
        for old, new in zip(inputs, make_inputs(dtype, seed=seed), strict=True):
            old.copy_(new)
        graph.replay()
        expected = mlstm_step(*inputs, other, backend="triton")
        assert torch.equal(h, expected) and torch.equal(state.C, other.C) and torch.equal(state.n, other.n)
