"""The sLSTM loops against a scalar definition, across documents, states and precisions.

Axes: B batch, S sequence, NH heads, DH dimension of a head.
"""

import pytest
import torch

from kernels.slstm import SLSTMState, slstm
from kernels.slstm.loop import STEPS_AT_ONCE, slstm_loop
from kernels.slstm.reference import slstm_recurrent
from tests.kernels.cases import assert_close, starts_at
from tests.kernels.slstm_cases import assert_documents_are_apart, outputs_and_gradients

B, S, NH, DH = 2, 37, 3, 4
FORMS = {"reference": slstm_recurrent, "loop": slstm_loop}
CAPS = [None, 2.0]


def make_inputs(dtype=torch.float64, *, length=S, seed=0, scale=2.0):
    """gates_x and recurrent_kernel, leaves."""
    torch.manual_seed(seed)
    gates_x, kernel = scale * torch.randn(B, length, 4, NH, DH), torch.randn(NH, DH, 4, DH)
    return [gates_x.to(dtype).requires_grad_(), kernel.to(dtype).requires_grad_()]


def make_state(dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    h, c, n, m = (torch.randn(B, NH, DH) for _ in range(4))
    return SLSTMState(*(x.to(dtype).requires_grad_() for x in (h, c, 1 + n.abs())), m.to(dtype))


def definition(gates_x, kernel, *, state, starts, cap):
    """Straight from the paper, sequence by sequence and head by head, without a stabiliser: h, and true c and n."""
    rows = []
    for b in range(gates_x.shape[0]):
        for head in range(NH):
            scale = state.m[b, head].exp()
            h, c, n = state.h[b, head], scale * state.c[b, head], scale * state.n[b, head]
            outputs = []
            for t in range(gates_x.shape[1]):
                if starts is not None and starts[b, t]:
                    h, c, n = torch.zeros_like(h), torch.zeros_like(c), torch.zeros_like(n)
                preacts = []
                for gate in range(4):
                    recurrent = sum(h[unit] * kernel[head, unit, gate] for unit in range(DH))
                    preacts.append(gates_x[b, t, gate, head] + recurrent)
                i, f, z, o = preacts
                if cap is not None:
                    i, f = cap * (i / cap).tanh(), cap * (f / cap).tanh()
                c = f.sigmoid() * c + i.exp() * z.tanh()
                n = f.sigmoid() * n + i.exp()
                h = o.sigmoid() * c / n
                outputs.append(h)
            rows.append((torch.stack(outputs), h, c, n))
    outputs, h, c, n = (torch.stack(parts).unflatten(0, (-1, NH)) for parts in zip(*rows, strict=True))
    return outputs.transpose(1, 2), h, c, n


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("positions", [None, [0, 5, 6]], ids=["one document", "documents"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_unstabilised_definition(form, positions, cap):
    inputs, state, starts = make_inputs(length=9), make_state(), starts_at(positions, B, 9)

    def stabilised(*args, initial_state, return_state):
        h, final = FORMS[form](
            *args, initial_state=initial_state, return_state=True, document_start=starts, gate_soft_cap=cap
        )
        scale = final.m.exp()
        return h, SLSTMState(final.h, scale * final.c, scale * final.n, torch.zeros_like(final.m))

    def unstabilised(*args, initial_state, return_state):
        h, last, c, n = definition(*args, state=initial_state, starts=starts, cap=cap)
        return h, SLSTMState(last, c, n, torch.zeros_like(c))

    assert_close(
        outputs_and_gradients(stabilised, inputs, state), outputs_and_gradients(unstabilised, inputs, state), 1e-9
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_first_token_of_an_empty_state_is_its_own_average(form):
    (gates_x, kernel) = make_inputs(length=1)
    h, state = FORMS[form](gates_x, kernel, return_state=True)
    i, _, z, o = gates_x.unbind(2)
    # c / n is tanh(z) whatever the input gate, and the stabiliser is the input gate's pre-activation.
    assert torch.allclose(h, o.sigmoid() * z.tanh(), rtol=0, atol=1e-12)
    assert torch.allclose(state.m, i[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("with_state", [False, True], ids=["empty", "state"])
@pytest.mark.parametrize("positions", [None, [0], [1], [36], [5, 6, 20], list(range(37))], ids=str)
def test_loop_equals_reference(positions, with_state, cap):
    inputs, state = make_inputs(), make_state() if with_state else None
    kind = {"document_start": starts_at(positions, B, S), "gate_soft_cap": cap}
    expected = outputs_and_gradients(slstm_recurrent, inputs, state, **kind)
    assert_close(outputs_and_gradients(slstm_loop, inputs, state, **kind), expected, 1e-9)


@pytest.mark.parametrize("length", [1, 2, STEPS_AT_ONCE - 1, STEPS_AT_ONCE, STEPS_AT_ONCE + 1, 2 * STEPS_AT_ONCE + 3])
def test_loop_equals_reference_at_any_length(length):
    # Gates of this size forget within a few tokens, so that rounding does not grow over the sequence.
    inputs, state = make_inputs(length=length), make_state()
    expected = outputs_and_gradients(slstm_recurrent, inputs, state)
    assert_close(outputs_and_gradients(slstm_loop, inputs, state), expected, 1e-9)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_finite_differences(form, cap):
    torch.manual_seed(3)
    shapes = [(1, 4, 4, 2, 2), (2, 2, 4, 2), (1, 2, 2), (1, 2, 2), (1, 2, 2)]
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    arguments[4] = 1 + arguments[4].abs()
    starts = torch.tensor([[False, False, True, False]])
    m = torch.full((1, 2, 2), 0.3, dtype=torch.float64)

    def true_values(gates_x, kernel, h, c, n):
        outputs, state = FORMS[form](
            gates_x,
            kernel,
            document_start=starts,
            initial_state=SLSTMState(h, c, n, m),
            return_state=True,
            gate_soft_cap=cap,
        )
        # The stabiliser counts as a constant, so only the true c and n have finite differences to compare with.
        return outputs, state.h, state.m.exp() * state.c, state.m.exp() * state.n

    assert torch.autograd.gradcheck(true_values, [x.requires_grad_() for x in arguments])


@pytest.mark.parametrize("split", [1, 19, 36])
@pytest.mark.parametrize("positions", [None, [0, 18, 19], [20]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_two_parts_with_a_passed_state_equal_one_pass(form, positions, split):
    inputs, state, starts = make_inputs(), make_state(), starts_at(positions, B, S)

    def in_two(gates_x, kernel, *, initial_state, return_state):
        parts = [slice(0, split), slice(split, S)]
        state, outputs = initial_state, []
        for part in parts:
            h, state = FORMS[form](
                gates_x[:, part],
                kernel,
                document_start=None if starts is None else starts[:, part],
                initial_state=state,
                return_state=True,
            )
            outputs.append(h)
        return torch.cat(outputs, dim=1), state

    expected = outputs_and_gradients(slstm_recurrent, inputs, state, document_start=starts)
    assert_close(outputs_and_gradients(in_two, inputs, state), expected, 1e-9)


def test_prefill_then_single_steps_equal_one_pass():
    (gates_x, kernel), starts = make_inputs(), starts_at([3, 25], B, S)
    with torch.no_grad():
        expected, last = slstm(gates_x, kernel, document_start=starts, return_state=True)
        h, state = slstm(gates_x[:, :20], kernel, document_start=starts[:, :20], return_state=True)
        outputs = [h]
        for t in range(20, S):
            step = slice(t, t + 1)
            h, state = slstm(
                gates_x[:, step], kernel, document_start=starts[:, step], initial_state=state, return_state=True
            )
            outputs.append(h)
    assert torch.allclose(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-12)
    for name in ("h", "c", "n", "m"):
        assert torch.allclose(getattr(state, name), getattr(last, name), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [1, 12, 32, 36])
@pytest.mark.parametrize("form", FORMS)
def test_documents_do_not_see_each_other(form, start, dtype):
    gates_x, kernel = make_inputs(dtype)

    def output(gates_x, starts, state):
        return FORMS[form](gates_x, kernel, document_start=starts, initial_state=state)[0]

    assert_documents_are_apart(output, gates_x, start, (make_state(dtype), make_state(dtype, seed=5)))


@pytest.mark.parametrize("form", FORMS)
def test_a_document_at_the_first_token_drops_the_initial_state(form):
    inputs, state = make_inputs(), make_state()
    starts = torch.zeros(B, S, dtype=torch.bool)
    starts[:, 0] = True
    h, _ = FORMS[form](*inputs, document_start=starts, initial_state=state)
    assert torch.equal(h, FORMS[form](*inputs)[0])
    for gradient in torch.autograd.grad(h.sum(), [state.h, state.c, state.n]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("igate", [-1e4, -100.0, 0.0, 100.0, 1e4])
@pytest.mark.parametrize("fgate", [-torch.inf, -1e4, -100.0, 0.0, 1e4])
@pytest.mark.parametrize("form", FORMS)
def test_extreme_gates_stay_finite(form, fgate, igate):
    gates_x, kernel = make_inputs(torch.float32)
    with torch.no_grad():
        gates_x[:, :, 0], gates_x[:, :, 1] = igate, fgate
        gates_x[:, 7:9, 0] = 30.0
    for starts in (None, starts_at([0, 9], B, S)):
        results = outputs_and_gradients(
            FORMS[form], [gates_x, kernel], make_state(torch.float32), document_start=starts
        )
        for name, value in results.items():
            assert value.isfinite().all(), name


@pytest.mark.parametrize("form", FORMS)
def test_float32_is_close_to_float64(form):
    # A small recurrent kernel: a chaotic one would make a large difference from any rounding.
    gates_x, kernel = make_inputs(torch.float32)
    inputs = [gates_x, (0.1 * kernel).detach().requires_grad_()]
    double = [x.detach().double().requires_grad_() for x in inputs]
    expected = outputs_and_gradients(slstm_recurrent, double, make_state())
    actual = outputs_and_gradients(FORMS[form], inputs, make_state(torch.float32))
    assert all(x.dtype == torch.float32 for x in actual.values())
    assert_close({name: x.double() for name, x in actual.items()}, expected, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_inputs_are_computed_in_float32(form):
    half = make_inputs(torch.bfloat16)
    single = [x.detach().float().requires_grad_() for x in half]
    h, state = FORMS[form](*half, return_state=True)
    expected, expected_state = FORMS[form](*single, return_state=True)
    assert torch.equal(h, expected.bfloat16())
    assert torch.equal(state.c, expected_state.c)
    for gradient, reference in zip(
        torch.autograd.grad(h.sum(), half), torch.autograd.grad(expected.sum(), single), strict=True
    ):
        assert torch.equal(gradient, reference.bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_nothing(form):
    inputs, state = make_inputs(torch.float32), make_state(torch.float32)

    def under_autocast(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return FORMS[form](*args, **kwargs)

    expected = outputs_and_gradients(FORMS[form], inputs, state)
    actual = outputs_and_gradients(under_autocast, inputs, state)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_the_loop_ignores_autocast_in_its_backward_pass():
    inputs = make_inputs(torch.float32)
    expected = outputs_and_gradients(slstm_loop, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_gradients(slstm_loop, inputs)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_frozen_kernel_gets_no_gradient():
    gates_x, kernel = make_inputs()
    h, _ = slstm(gates_x, kernel.detach())
    expected, _ = slstm_recurrent(gates_x, kernel.detach())
    assert torch.allclose(
        torch.autograd.grad(h.sum(), gates_x)[0], torch.autograd.grad(expected.sum(), gates_x)[0], rtol=0, atol=1e-9
    )


def test_the_inputs_are_left_alone():
    inputs, state = make_inputs(), make_state()
    tensors = [*inputs, state.h, state.c, state.n, state.m]
    copies = [x.detach().clone() for x in tensors]
    outputs_and_gradients(slstm_loop, inputs, state, gate_soft_cap=2.0, document_start=starts_at([4], B, S))
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))
    # Shapes for which the loop's layout is the input's own memory.
    single = torch.randn(1, 5, 4, 1, 3)
    copy = single.clone()
    slstm(single, torch.randn(1, 3, 4, 3), gate_soft_cap=2.0)
    assert torch.equal(single, copy)


def test_state_can_be_detached_and_converted():
    state = make_state()
    assert not state.detach().c.requires_grad
    assert state.to("cpu", torch.float32).n.dtype == torch.float32
    assert state.to("meta").h.device.type == "meta"


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_backends_agree(backend):
    inputs = make_inputs()
    assert torch.allclose(slstm(*inputs, backend=backend)[0], slstm_recurrent(*inputs)[0], rtol=0, atol=1e-12)
    assert slstm(*inputs, backend=backend)[1] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates_x": torch.zeros(B, S, 3, NH, DH)}, r"gates_x must be \[B, S, 4, NH, DH\] .* got \(2, 37, 3, 3, 4\)"),
        ({"gates_x": torch.zeros(B, 0, 4, NH, DH)}, r"gates_x must be \[B, S, 4, NH, DH\] with at least one token"),
        ({"recurrent_kernel": torch.zeros(NH, 4, DH, DH + 1)}, r"recurrent_kernel must have shape \(3, 4, 4, 4\)"),
        ({"document_start": torch.zeros(B, S + 1, dtype=torch.bool)}, r"document_start must have shape \(2, 37\)"),
        ({"document_start": torch.zeros(B, S)}, "document_start must be bool, got torch.float32"),
        ({"gate_soft_cap": 0.0}, "gate_soft_cap must be positive, not 0.0; use null"),
        ({"backend": "cuda"}, "unknown sLSTM backend 'cuda'; use one of auto, reference"),
        (
            {"initial_state": SLSTMState(*(torch.zeros(B, NH, DH + 1) for _ in range(4)))},
            r"initial_state.h must have shape \(2, 3, 4\)",
        ),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = dict(zip(("gates_x", "recurrent_kernel"), make_inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        slstm(**(arguments | change))
