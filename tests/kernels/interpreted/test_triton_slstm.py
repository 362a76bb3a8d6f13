"""The Triton kernels of the sLSTM against the reference in float64 on the rounded inputs, forward and backward.

Axes: B batch, S sequence, NH heads, DH dimension of a head.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.slstm import SLSTMState, slstm, triton_op
from kernels.slstm.triton_tiles import Tiles
from tests.kernels import cases, slstm_cases
from tests.kernels.cases import assert_close
from tests.kernels.triton_cases import COMPILED, DEVICE, compiled_only, padded, strided

B, S, NH, DH = 3, 8, 2, 24
HEAD_DIMS = [16, 48, 64, 96, 128, 192, 256, 384, 512] if COMPILED else [16, 24]
# Of outputs and states, and of gradients.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (4e-3, 1e-2)}
CAPS = [None, 2.0]
OUTPUTS = ("h", "final h", "c", "n", "m")


def make_inputs(dtype=torch.float32, head_dim=DH, *, batch=B, length=S, kernel_dtype=None):
    """gates_x and recurrent_kernel, leaves, with values that dtype holds."""
    torch.manual_seed(0)
    gates_x = 1.5 * torch.randn(batch, length, 4, NH, head_dim)
    kernel = 1.5 * head_dim**-0.5 * torch.randn(NH, head_dim, 4, head_dim)
    return [gates_x.to(DEVICE, dtype).requires_grad_(), kernel.to(DEVICE, kernel_dtype or dtype).requires_grad_()]


def make_state(head_dim=DH, *, batch=B, seed=1):
    torch.manual_seed(seed)
    h, c, n, m = (torch.randn(batch, NH, head_dim).to(DEVICE) for _ in range(4))
    return SLSTMState(*(x.requires_grad_() for x in (h, c, 1 + n.abs())), m)


def starts_at(positions, *, batch=B, length=S):
    return cases.starts_at(positions, batch, length, DEVICE)


def outputs_and_gradients(inputs, state=None, *, function=slstm, backend="triton", **kwargs):
    return slstm_cases.outputs_and_gradients(function, inputs, state, backend=backend, **kwargs)


def exact(inputs, state=None, **kwargs):
    double = [x.detach().double().requires_grad_() for x in inputs]
    if state is not None:
        parts = [x.detach().double().requires_grad_() for x in (state.h, state.c, state.n)]
        state = SLSTMState(*parts, state.m.double())
    return outputs_and_gradients(double, state, backend="reference", **kwargs)


def check(inputs, state=None, **kwargs):
    actual = outputs_and_gradients(inputs, state, **kwargs)
    assert actual["h"].dtype == inputs[0].dtype and actual["c"].dtype == torch.float32
    assert actual["d gates_x"].dtype == inputs[0].dtype
    assert actual["d recurrent_kernel"].dtype == inputs[1].dtype
    output, gradient = TOLERANCES[inputs[1].dtype]
    limits = {name: output if name in OUTPUTS else gradient for name in actual}
    kwargs.pop("function", None)
    assert_close(actual, exact(inputs, state, **kwargs), limits)
    return actual


def assert_same(actual, expected):
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def assert_same_program(actual, expected):
    """Bit for bit where programs are interpreted; two compilations may contract multiply-adds differently."""
    if not COMPILED:
        assert_same(actual, expected)
    assert_close(actual, expected, {name: 1e-6 for name in actual})


@pytest.mark.parametrize("with_state", [False, True], ids=["empty", "state"])
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_equals_the_reference(head_dim, cap, with_state, dtype):
    if dtype == torch.float32 and head_dim > 256:
        pytest.skip("refused: see test_says_what_it_cannot_do")
    state = make_state(head_dim) if with_state else None
    check(make_inputs(dtype, head_dim), state, gate_soft_cap=cap, document_start=starts_at([4, 5]))


@pytest.mark.parametrize("positions", [None, [1], [S - 1], [0, 3, 4], list(range(S))], ids=str)
def test_documents(positions, dtype):
    check(make_inputs(dtype), make_state(), document_start=starts_at(positions))


@pytest.mark.parametrize("batch, length", [(1, 1), (2, 2), (16, 3), (17, 2), (70, 2)])
def test_any_size(batch, length, dtype):
    inputs, state = make_inputs(dtype, batch=batch, length=length), make_state(batch=batch)
    check(inputs, state, document_start=starts_at([1], batch=batch, length=length))


@compiled_only
@pytest.mark.parametrize("head_dim", [64, 256, 512])
def test_many_tokens_and_sequences(head_dim):
    inputs = make_inputs(torch.bfloat16, head_dim, batch=200, length=300)
    check(inputs, make_state(head_dim, batch=200), document_start=starts_at([150], batch=200, length=300))


def test_gates_may_have_more_precision_than_the_weights():
    kernel_dtype = torch.bfloat16 if COMPILED else torch.float16
    check(make_inputs(torch.float32, kernel_dtype=kernel_dtype), make_state(), document_start=starts_at([4]))


def test_autocast_chooses_the_precision_of_the_product():
    dtype = torch.bfloat16 if COMPILED else torch.float16
    gates_x, kernel = make_inputs()
    with torch.autocast(DEVICE.type, dtype):
        actual, _ = slstm(gates_x, kernel, backend="triton")
    assert torch.equal(actual, slstm(gates_x, kernel.to(dtype), backend="triton")[0])
    assert not torch.equal(actual, slstm(gates_x, kernel, backend="triton")[0])


def test_autocast_admits_the_heads_of_its_own_precision():
    """Weights of 300 units fit on chip in 16 bits, not in the float32 that they are kept in."""
    dtype = torch.bfloat16 if COMPILED else torch.float16
    gates_x, kernel = make_inputs(head_dim=300, length=2)
    with pytest.raises(ValueError, match="at most 256 units"):
        slstm(gates_x, kernel, backend="triton")
    with torch.autocast(DEVICE.type, dtype):
        actual, _ = slstm(gates_x, kernel, backend="triton")
    assert torch.equal(actual, slstm(gates_x, kernel.to(dtype), backend="triton")[0])


@pytest.mark.parametrize("split", [1, 5, S - 1])
@pytest.mark.parametrize("positions", [None, [0, 5, 6]], ids=str)
def test_two_parts_with_a_passed_state_equal_one_pass(positions, split):
    def in_two(gates_x, kernel, *, initial_state, document_start, **kwargs):
        state, outputs = initial_state, []
        for part in (slice(0, split), slice(split, S)):
            starts = None if document_start is None else document_start[:, part]
            h, state = slstm(gates_x[:, part], kernel, initial_state=state, document_start=starts, **kwargs)
            outputs.append(h)
        return torch.cat(outputs, dim=1), state

    check(make_inputs(), make_state(), function=in_two, document_start=starts_at(positions))


@pytest.mark.parametrize("start", [1, S - 1])
def test_documents_do_not_see_each_other(start, dtype):
    gates_x, kernel = make_inputs(dtype)

    def output(gates_x, starts, state):
        return slstm(gates_x, kernel, document_start=starts, initial_state=state, backend="triton")[0]

    slstm_cases.assert_documents_are_apart(output, gates_x, start, (make_state(), make_state(seed=5)))


def test_a_document_at_the_first_token_drops_the_initial_state(dtype):
    inputs, state = make_inputs(dtype), make_state()
    starts = torch.zeros(B, S, dtype=torch.bool, device=DEVICE)
    starts[:, 0] = True
    h, _ = slstm(*inputs, document_start=starts, initial_state=state, backend="triton")
    assert torch.equal(h, slstm(*inputs, backend="triton")[0])
    for gradient in torch.autograd.grad(h.sum(), [state.h, state.c, state.n]):
        assert not gradient.any()


def test_a_state_that_has_seen_nothing_is_no_state(dtype):
    inputs = make_inputs(dtype)
    empty = SLSTMState.empty(B, NH, DH, device=DEVICE, dtype=torch.float32)
    empty.m += 40
    parts = [x.requires_grad_() for x in (empty.h, empty.c, empty.n)]
    results = check(inputs, SLSTMState(*parts, empty.m))
    assert torch.equal(results["h"], slstm(*inputs, backend="triton")[0])


@pytest.mark.parametrize("view", [padded, strided])
def test_inputs_may_be_strided(view):
    inputs, state, starts = make_inputs(), make_state(), starts_at([4])
    expected = outputs_and_gradients(inputs, state, document_start=starts)
    views = [view(x.detach()).requires_grad_() for x in inputs]
    parts = [view(x.detach()).requires_grad_() for x in (state.h, state.c, state.n)]
    other_state = SLSTMState(*parts, view(state.m))
    actual = outputs_and_gradients(views, other_state, document_start=view(starts))
    # The matrix products of the other gradients may choose another order of summation.
    assert_same(actual, {name: expected[name] for name in (*OUTPUTS, "d gates_x", "d initial c")})
    assert_close(actual, expected, 1e-6)


def test_runs_are_bitwise_equal_and_sequences_independent(dtype):
    inputs, state = make_inputs(dtype, batch=18), make_state(batch=18)
    first = outputs_and_gradients(inputs, state)
    assert_same(outputs_and_gradients(inputs, state), first)
    part = SLSTMState(*(x[17:] for x in (state.h, state.c, state.n, state.m)))
    h, last = slstm(inputs[0][17:], inputs[1], initial_state=part, return_state=True, backend="triton")
    assert torch.equal(h, first["h"][17:]) and torch.equal(last.c, first["c"][17:])
    gradient = torch.autograd.grad(h.float().square().sum(), inputs[0])[0]
    h, _ = slstm(*inputs, initial_state=state, backend="triton")
    assert torch.equal(gradient[17:], torch.autograd.grad(h.float().square().sum(), inputs[0])[0][17:])


@pytest.mark.parametrize("igate", [-1e4, 100.0, 1e4])
@pytest.mark.parametrize("fgate", [-torch.inf, -1e4, 0.0, 1e4])
def test_extreme_gates_stay_finite(fgate, igate):
    gates_x, kernel = make_inputs()
    with torch.no_grad():
        gates_x[:, :, 0], gates_x[:, :, 1] = igate, fgate
        gates_x[:, 5:7, 0] = 30.0
    # The third sequence has no start.
    for name, value in outputs_and_gradients([gates_x, kernel], make_state(), document_start=starts_at([0, 6])).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("regime", ["initial", "forgetting", "saturated", "one huge input"])
def test_gate_regimes(regime, dtype):
    inputs = make_inputs(dtype, length=13)
    with torch.no_grad():
        i, f = inputs[0][:, :, 0], inputs[0][:, :, 1]
        if regime == "initial":
            i.sub_(10), f.add_(4.5)
        elif regime == "forgetting":
            f.fill_(-15)
        elif regime == "saturated":
            i.copy_(15 * i.sign()), f.copy_(15 * f.sign())
        else:
            i[:, 5] = 12
    check(inputs, make_state(), gate_soft_cap=15.0)


def test_a_nan_stays_in_its_sequence(dtype):
    gates_x, kernel = make_inputs(dtype)
    expected, _ = slstm(gates_x, kernel, backend="triton")
    spoiled = gates_x.detach().clone()
    spoiled[1, 4, 2] = torch.nan
    actual, _ = slstm(spoiled, kernel, backend="triton")
    assert torch.equal(actual[[0, 2]], expected[[0, 2]]) and torch.equal(actual[1, :4], expected[1, :4])
    assert actual[1, 4:].isnan().all()


def test_single_steps_by_a_team_equal_one_pass(monkeypatch, dtype):
    """At one token nobody waits, so that a team of programs can also run one after the other."""
    inputs, state = make_inputs(dtype, 48, length=3), make_state(48)
    tiles = Tiles(units=16, rows=16)
    monkeypatch.setattr(triton_op, "default_tiles", lambda head_dim, dtype: tiles)
    assert tiles.team(48) == 3

    def by_steps(gates_x, kernel, *, initial_state, **kwargs):
        state, outputs = initial_state, []
        for t in range(gates_x.shape[1]):
            h, state = slstm(gates_x[:, t : t + 1], kernel, initial_state=state, **kwargs)
            outputs.append(h)
        return torch.cat(outputs, dim=1), state

    check(inputs, state, function=by_steps, gate_soft_cap=2.0)


@pytest.mark.skipif(COMPILED, reason="a team on a GPU does answer")
def test_a_team_that_does_not_answer_gives_nan(monkeypatch):
    """Interpreted, the first program of a team needs what a second that has not begun would send."""
    gates_x, kernel = make_inputs(head_dim=32, length=3)
    expected, _ = slstm(gates_x, kernel, backend="triton")
    monkeypatch.setattr(triton_op, "default_tiles", lambda head_dim, dtype: Tiles(units=16, rows=16))
    h, _ = slstm(gates_x, kernel, backend="triton")
    assert_close({"h": h[:, 0]}, {"h": expected[:, 0]}, 1e-6)
    assert h[:, 1:, :, :16].isnan().all()
    # The forward pass was that of one program.
    gradient = torch.autograd.grad(expected[:, 2].sum(), gates_x)[0]
    assert gradient[:, 2].isfinite().all() and gradient[:, :2, :, :, :16].isnan().all()


def test_checkpointing_and_no_grad_change_nothing():
    inputs, state = make_inputs(), make_state()
    expected = outputs_and_gradients(inputs, state)

    def checkpointed(*args, **kwargs):
        return checkpoint(slstm, *args, use_reentrant=False, **kwargs)

    assert_same(outputs_and_gradients(inputs, state, function=checkpointed), expected)
    with torch.no_grad():
        h, _ = slstm(*inputs, initial_state=state, backend="triton")
    assert_same_program({"h": h}, {"h": expected["h"]})


def test_a_frozen_kernel_gets_no_gradient():
    gates_x, kernel = make_inputs()
    h, _ = slstm(gates_x, kernel.detach(), backend="triton")
    expected = outputs_and_gradients([gates_x, kernel])["h"]
    assert torch.equal(h, expected)
    assert torch.autograd.grad(h.sum(), gates_x)[0].isfinite().all()


def test_compiles_into_one_graph():
    inputs, state, starts = make_inputs(length=3), make_state(), starts_at([1], length=3)
    expected = outputs_and_gradients(inputs, state, document_start=starts)
    compiled = torch.compile(slstm, fullgraph=True, backend="inductor" if COMPILED else "aot_eager")
    assert_same_program(outputs_and_gradients(inputs, state, function=compiled, document_start=starts), expected)


@pytest.mark.parametrize("with_cap", [False, True])
def test_the_operators_are_registered_rightly(with_cap):
    gates_x, kernel = make_inputs(length=2)
    state = make_state()
    cap = 2.0 if with_cap else None
    arguments = (gates_x, kernel, starts_at([1], length=2), state.h, state.c, state.n, state.m, cap, True)
    torch.library.opcheck(torch.ops.xlstm_pretrain.slstm, arguments)
    with torch.no_grad():
        h, _, derivatives, *last = torch.ops.xlstm_pretrain.slstm(*arguments)
        backward = (h, *last[:3], kernel, arguments[2], derivatives, torch.float32, with_cap)
        torch.library.opcheck(torch.ops.xlstm_pretrain.slstm_backward, backward)


@compiled_only
def test_a_graph_replays_it():
    gates_x, kernel = make_inputs(torch.bfloat16, 256, length=20)

    def step():
        h, _ = slstm(gates_x, kernel, backend="triton")
        return h, *torch.autograd.grad(h.sum(), [gates_x, kernel])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        gates_x.copy_(gates_x.flip(1))
    expected = step()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize(
    "dtype, kernel_dtype, head_dim, reason",
    [
        (torch.float64, torch.float32, 16, "gates_x is torch.float64"),
        (torch.float32, torch.float64, 16, "recurrent_kernel is torch.float64"),
        (torch.float32, torch.float32, 257, "heads with torch.float32 weights have at most 256 units, and these have"),
        (torch.float16, torch.float16, 513, "heads with torch.float16 weights have at most 512 units, and these have"),
    ],
)
def test_says_what_it_cannot_do(dtype, kernel_dtype, head_dim, reason):
    inputs = make_inputs(dtype, head_dim, batch=1, length=1, kernel_dtype=kernel_dtype)
    with pytest.raises(ValueError, match=f"sLSTM backend 'triton' cannot do this: {reason}"):
        slstm(*inputs, backend="triton")
    assert slstm(*inputs, backend="auto")[0].isfinite().all()
