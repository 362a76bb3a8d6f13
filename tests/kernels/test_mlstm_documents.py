"""Nothing of one document reaches another one, bit for bit, and nothing of the future reaches the past."""

import pytest
import torch

from tests.kernels.mlstm_cases import DOCUMENTS, FORMS, GATE_KINDS, INPUT_NAMES, B, S, make_inputs, make_state

START, END = 11, 24


def run(form, inputs, cotangent, starts, state, gate="exp", normaliser=True):
    """h and the gradients of the five inputs, each [B, S, ...]."""
    function, options = FORMS[form]
    kind = {"gate": gate, "normaliser": normaliser}
    h, _ = function(*inputs, document_start=starts, initial_state=state, **kind, **options)
    return [h, *torch.autograd.grad(h, inputs, cotangent)]


def altered(inputs, positions):
    """The same inputs with other values, of another size, at the positions."""
    torch.manual_seed(99)
    others = []
    for x in inputs:
        other = x.detach().clone()
        other[:, positions] = 3 * torch.randn_like(other[:, positions])
        others.append(other.requires_grad_())
    return others


def assert_bitwise_equal(first, second, positions):
    for name, a, b in zip(["h", *(f"d {name}" for name in INPUT_NAMES)], first, second, strict=True):
        assert torch.equal(a[:, positions], b[:, positions]), f"{name} differs in another document"
        assert a[:, positions].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("gate", "normaliser"), GATE_KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_document_does_not_see_the_others(form, gate, normaliser, dtype):
    # Three documents; the middle one lies across several chunks and shares its first and last chunk.
    starts = torch.zeros(B, S, dtype=torch.bool)
    starts[:, [START, END]] = True
    documents = [slice(0, START), slice(START, END), slice(END, S)]
    inputs, state = make_inputs(dtype=dtype), make_state(gate, dtype)
    cotangent = torch.randn(B, S, *inputs[2].shape[2:], dtype=dtype)
    before = run(form, inputs, cotangent, starts, state, gate, normaliser)
    for changed in documents:
        other_cotangent = cotangent.clone()
        other_cotangent[:, changed] *= -5
        after = run(form, altered(inputs, changed), other_cotangent, starts, state, gate, normaliser)
        assert not torch.equal(before[0][:, changed], after[0][:, changed])
        for document in documents:
            if document is not changed:
                assert_bitwise_equal(before, after, document)


@pytest.mark.parametrize("start", [1, 7, 8, 9, 15, 36])
@pytest.mark.parametrize("form", FORMS)
def test_no_leak_at_any_edge(form, start):
    starts = torch.zeros(B, S, dtype=torch.bool)
    starts[:, start] = True
    inputs, cotangent = make_inputs(dtype=torch.float32), torch.randn(B, S, 3, 5)
    before = run(form, inputs, cotangent, starts, make_state(dtype=torch.float32))
    after = run(form, altered(inputs, slice(0, start)), cotangent, starts, make_state(dtype=torch.float32, seed=5))
    assert_bitwise_equal(before, after, slice(start, S))


@pytest.mark.parametrize("regime", ["saturated", "strong forgetting", "huge input gate"])
@pytest.mark.parametrize("form", FORMS)
def test_no_leak_with_extreme_gates(form, regime):
    starts = torch.zeros(B, S, dtype=torch.bool)
    starts[:, START] = True
    cotangent = torch.randn(B, S, 3, 5)
    inputs = make_inputs(dtype=torch.float32)
    extreme = make_inputs(regime, torch.float32, seed=8)
    mixed = []
    for ordinary, other in zip(inputs, extreme, strict=True):
        mixed.append(torch.cat([other[:, :START], ordinary[:, START:]], dim=1).detach().requires_grad_())
    before = run(form, inputs, cotangent, starts, None)
    after = run(form, mixed, cotangent, starts, None)
    assert_bitwise_equal(before, after, slice(START, S))


@pytest.mark.parametrize("form", FORMS)
def test_a_document_at_the_first_token_drops_the_initial_state(form):
    function, options = FORMS[form]
    inputs, state = make_inputs(), make_state()
    starts = torch.zeros(B, S, dtype=torch.bool)
    starts[:, 0] = True
    h, final = function(*inputs, document_start=starts, initial_state=state, return_state=True, **options)
    empty, empty_final = function(*inputs, return_state=True, **options)
    assert torch.equal(h, empty)
    assert torch.equal(final.C, empty_final.C)
    for gradient in torch.autograd.grad(h.sum() + final.C.sum() + final.n.sum(), [state.C, state.n]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("documents", ["none", "several in one chunk"])
@pytest.mark.parametrize("form", FORMS)
def test_the_past_does_not_see_the_future(form, documents):
    starts = None
    if DOCUMENTS[documents] is not None:
        starts = torch.zeros(B, S, dtype=torch.bool)
        starts[:, DOCUMENTS[documents]] = True
    function, options = FORMS[form]
    inputs = make_inputs(dtype=torch.float32)
    before, _ = function(*inputs, document_start=starts, **options)
    after, _ = function(*altered(inputs, slice(20, S)), document_start=starts, **options)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])
