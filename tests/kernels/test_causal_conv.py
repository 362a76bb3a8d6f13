"""The causal convolution against a loop over its definition. Axes: B batch, S sequence, C channels, K kernel size."""

import pytest
import torch

from kernels.causal_conv import causal_conv
from tests.kernels.cases import starts_at

B, S, C = 2, 19, 5


def make_inputs(kernel_size=4, dtype=torch.float64, length=S):
    """x, weight, bias and tail, leaves."""
    torch.manual_seed(0)
    shapes = [(B, length, C), (C, 1, kernel_size), (C,), (B, kernel_size - 1, C)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def definition(x, weight, bias, starts, tail):
    """Token by token over the inputs that the document has had so far: y and the new tail."""
    kernel_size = weight.shape[-1]
    rows, tails = [], []
    for b in range(len(x)):
        seen = list(tail[b])
        outputs = []
        for t in range(x.shape[1]):
            if starts is not None and starts[b, t]:
                seen = []
            seen.append(x[b, t])
            y = bias
            for back, value in enumerate(reversed(seen[-kernel_size:])):
                y = y + weight[:, 0, kernel_size - 1 - back] * value
            outputs.append(y)
        rows.append(torch.stack(outputs))
        history = kernel_size - 1
        kept = ([torch.zeros_like(bias)] * history + seen)[len(seen) :] if history else []
        tails.append(torch.stack(kept) if kept else tail[b])
    return torch.stack(rows), torch.stack(tails)


def with_gradients(y, new_tail, wanted):
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(part.shape, generator=generator).to(part.dtype) for part in (y, new_tail)]
    return [y, new_tail, *torch.autograd.grad([y, new_tail], wanted, cotangents, materialize_grads=True)]


@pytest.mark.parametrize("kernel_size", [2, 3, 4, 6])
@pytest.mark.parametrize("positions", [None, [0], [1], [18], [5, 6, 8], list(range(S))], ids=str)
def test_equals_the_definition(positions, kernel_size):
    inputs = make_inputs(kernel_size)
    x, weight, bias, tail = inputs
    starts = starts_at(positions, B, S)
    expected = with_gradients(*definition(x, weight, bias, starts, tail), inputs)
    actual = with_gradients(*causal_conv(x, weight, bias, document_start=starts, tail=tail), inputs)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", [None, [3]], ids=str)
def test_a_kernel_of_one_token_has_no_tail(positions):
    x, weight, bias, _ = make_inputs(1)
    y, tail = causal_conv(x, weight, bias, document_start=starts_at(positions, B, S))
    assert torch.allclose(y, bias + x * weight[:, 0, 0], rtol=0, atol=1e-12)
    assert tail.shape == (B, 0, C)


def test_without_a_tail_the_past_is_zero():
    x, weight, bias, tail = make_inputs()
    y, _ = causal_conv(x, weight, bias)
    assert torch.equal(y, causal_conv(x, weight, bias, tail=torch.zeros_like(tail))[0])


@pytest.mark.parametrize("split", [1, 2, 9, 18])
@pytest.mark.parametrize("positions", [None, [0, 8, 9, 10]], ids=str)
def test_two_parts_with_a_passed_tail_equal_one_pass(positions, split):
    inputs = make_inputs()
    x, weight, bias, tail = inputs
    starts = starts_at(positions, B, S)
    expected = with_gradients(*causal_conv(x, weight, bias, document_start=starts, tail=tail), inputs)
    outputs = []
    for part in (slice(0, split), slice(split, S)):
        part_starts = None if starts is None else starts[:, part]
        y, tail = causal_conv(x[:, part], weight, bias, document_start=part_starts, tail=tail)
        outputs.append(y)
    actual = with_gradients(torch.cat(outputs, dim=1), tail, inputs)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_token_by_token_equals_one_pass():
    x, weight, bias, tail = make_inputs()
    starts = starts_at([2, 9], B, S)
    expected, last = causal_conv(x, weight, bias, document_start=starts, tail=tail)
    for t in range(S):
        step = slice(t, t + 1)
        y, tail = causal_conv(x[:, step], weight, bias, document_start=starts[:, step], tail=tail)
        assert torch.allclose(y, expected[:, step], rtol=0, atol=1e-12)
    assert torch.equal(tail, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [0, 1, 2, 7, 18])
def test_documents_do_not_see_each_other(start, dtype):
    x, weight, bias, tail = make_inputs(dtype=dtype)
    starts = torch.zeros(B, S, dtype=torch.bool)
    starts[:, start] = True
    cotangent = torch.randn(B, S, C, dtype=dtype)

    def run(x, cotangent, tail):
        x = x.detach().requires_grad_()
        y, new_tail = causal_conv(x, weight, bias, document_start=starts, tail=tail)
        return y, torch.autograd.grad(y, x, cotangent)[0], new_tail

    before = run(x, cotangent, tail)
    others, other_cotangent = x.detach().clone(), cotangent.clone()
    # Not even a NaN comes through.
    others[:, :start], other_cotangent[:, :start] = torch.nan, 3.0
    after = run(others, other_cotangent, torch.full_like(tail, torch.nan))
    for a, b in zip(before[:2], after[:2], strict=True):
        assert torch.equal(a[:, start:], b[:, start:])
    assert torch.equal(before[2], after[2])

    others, other_cotangent = x.detach().clone(), cotangent.clone()
    others[:, start:], other_cotangent[:, start:] = 3.0, -7.0
    after = run(others, other_cotangent, tail)
    for a, b in zip(before[:2], after[:2], strict=True):
        assert torch.equal(a[:, :start], b[:, :start])


def test_the_tail_does_not_keep_the_sequence_alive():
    x, weight, bias, _ = make_inputs()
    _, tail = causal_conv(x.detach(), weight.detach(), bias.detach())
    assert tail.untyped_storage().nbytes() == tail.numel() * tail.element_size()


@pytest.mark.parametrize("positions", [None, [5]], ids=str)
def test_bfloat16_is_summed_in_float32_even_under_autocast(positions):
    x, weight, bias, tail = (part.detach() for part in make_inputs(dtype=torch.bfloat16))
    starts = starts_at(positions, B, S)
    single = [part.float() for part in (x, weight, bias)]
    expected, _ = causal_conv(*single, document_start=starts, tail=tail.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, new_tail = causal_conv(x, weight, bias, document_start=starts, tail=tail)
    assert y.dtype == new_tail.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(C + 1, 1, 4)}, r"weight \[C, 1, K\] and bias \[C\] for C = 5 .* got \(6, 1, 4\)"),
        ({"bias": torch.zeros(1)}, r"for C = 5 channels, got \(5, 1, 4\) and \(1,\)"),
        ({"document_start": torch.zeros(B, 3, dtype=torch.bool)}, r"document_start must be \[B, S\] = \(2, 19\)"),
        ({"tail": torch.zeros(B, 4, C)}, r"tail must be \[B, K - 1, C\] = \(2, 3, 5\), got \(2, 4, 5\)"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = dict(zip(("x", "weight", "bias", "tail"), make_inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        causal_conv(**(arguments | change))
