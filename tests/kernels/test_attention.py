"""Fused attention against its definition: windows, sinks, caches, documents. Axes as in kernels/attention.py."""

import itertools

import pytest
import torch

from kernels.attention import attention, attention_mask, attention_reference, keys_per_query

# (tokens before, queries, window): one block, several, a last one cut short, a window of one token and of all.
LAYOUTS = [(0, 13, None), (0, 13, 4), (0, 12, 4), (3, 13, 4), (3, 1, 4), (4, 9, None), (0, 5, 1), (0, 7, 7), (6, 3, 7)]


def inputs(cached: int, length: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    make = lambda *shape: torch.randn(*shape, dtype=dtype, generator=generator)  # noqa: E731
    q, k, v = make(2, length, 4, 8), make(2, cached + length, 2, 8), make(2, cached + length, 2, 8)
    return q, k, v, make(4)


def starts(length: int) -> torch.Tensor:
    document_start = torch.zeros(2, length, dtype=torch.bool)
    document_start[0, [0, length // 2]] = True
    return document_start


@pytest.mark.parametrize("has_documents", [True, False], ids=["documents", "one document"])
@pytest.mark.parametrize("has_sinks", [True, False], ids=["sinks", "no sinks"])
@pytest.mark.parametrize(("cached", "length", "window"), LAYOUTS)
def test_forward_and_backward_are_those_of_the_definition(cached, length, window, has_sinks, has_documents):
    *tensors, sinks = inputs(cached, length)
    tensors = [*tensors, sinks] if has_sinks else tensors
    settings = {
        "document_start": starts(length) if has_documents else None,
        "carried": torch.tensor([cached, 1]) if cached else None,
        "window": window,
    }
    results = []
    for function in (attention, attention_reference):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        y = function(*leaves[:3], sinks=leaves[3] if has_sinks else None, **settings)
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y, *torch.autograd.grad((y * weights).sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_the_definition_one_query_at_a_time():
    q, k, v, sinks = inputs(3, 6)
    document_start = starts(6)
    y = attention_reference(q, k, v, document_start=document_start, carried=torch.tensor([3, 2]), window=4, sinks=sinks)
    for row, query, head in itertools.product(range(2), range(6), range(4)):
        begins = [place for place in range(query + 1) if document_start[row, place]]
        # The second row's open document has two of the cached tokens.
        first = 3 + begins[-1] if begins else row
        seen = range(max(first, query + 3 - 3), query + 4)
        scores = torch.stack([q[row, query, head] @ k[row, place, head // 2] / 8**0.5 for place in seen])
        weights = scores.exp() / (scores.exp().sum() + sinks[head].exp())
        expected = sum(weight * v[row, place, head // 2] for weight, place in zip(weights, seen, strict=True))
        torch.testing.assert_close(y[row, query, head], expected)


def test_a_sink_far_below_all_scores_changes_nothing_and_one_far_above_leaves_nothing():
    q, k, v, _ = inputs(0, 9)
    plain = attention(q, k, v, window=4)
    torch.testing.assert_close(attention(q, k, v, window=4, sinks=torch.full((4,), -200.0)), plain)
    assert attention(q, k, v, window=4, sinks=torch.full((4,), 200.0)).abs().max() < 1e-30


def test_changing_what_a_query_does_not_see_changes_no_bit():
    q, k, v, sinks = inputs(0, 12)
    others = [tensor.clone() for tensor in (k, v)]
    for tensor in others:
        tensor[:, :5] += 1
    for settings in ({}, {"sinks": sinks}):
        first, second = (attention(q, *pair, window=4, **settings) for pair in ((k, v), others))
        assert torch.equal(first[:, 8:], second[:, 8:]) and not torch.equal(first[:, :8], second[:, :8])


def test_a_window_makes_work_and_masks_that_grow_with_it():
    mask = attention_mask(1000, torch.zeros(2, 1000, dtype=torch.bool), None, window=16)
    assert mask.shape == (2, 63, 16, 32) and keys_per_query(1000, 16) == 32
    assert keys_per_query(16, 16) == keys_per_query(16, None) == 16


@pytest.mark.parametrize("window", [None, 4])
def test_bfloat16_is_near_float64(window):
    q, k, v, sinks = inputs(0, 13, torch.bfloat16)
    rough = attention(q, k, v, window=window, sinks=sinks)
    exact = attention_reference(*(x.double() for x in (q, k, v)), window=window, sinks=sinks.double())
    assert rough.dtype == torch.bfloat16
    assert (rough.double() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("has_sinks", [True, False], ids=["sinks", "no sinks"])
@pytest.mark.parametrize("window", [None, 4])
def test_nothing_is_made_on_another_device(window, has_sinks):
    q, k, v, sinks = (tensor.to("meta") for tensor in inputs(0, 13))
    assert attention(q, k, v, window=window, sinks=sinks if has_sinks else None).device.type == "meta"
