"""The head norm against torch's layer norm of each head. Axes: B batch, S sequence, NH heads, DV value dimension."""

import pytest
import torch
import torch.nn.functional as F

from kernels.head_norm import gated_head_norm, head_norm

B, S, NH, DV = 2, 7, 3, 8


def make_inputs(dtype=torch.float64, scale=1.0):
    torch.manual_seed(0)
    h, weight = scale * torch.randn(B, S, NH, DV) + 2 * scale, torch.randn(NH * DV)
    return [h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
# The second is what an mLSTM puts out at initialisation, where eps matters.
@pytest.mark.parametrize("scale", [1.0, 3e-4])
def test_equals_layer_norm_of_each_head(scale, eps):
    h, weight = make_inputs(scale=scale)
    heads = [F.layer_norm(h[:, :, n], (DV,), weight[n * DV : (n + 1) * DV], None, eps) for n in range(NH)]
    expected = torch.cat(heads, dim=-1)
    actual = head_norm(h, weight, eps=eps)
    assert actual.shape == (B, S, NH * DV)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(actual, [h, weight], cotangent),
        torch.autograd.grad(expected, [h, weight], cotangent),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_removes_the_mean_and_has_no_bias():
    h, weight = make_inputs()
    normalised = head_norm(h, torch.ones_like(weight), eps=0.0).unflatten(-1, (NH, DV))
    assert torch.allclose(normalised.mean(-1), torch.zeros(B, S, NH, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(normalised.var(-1, correction=0), torch.ones(B, S, NH, dtype=torch.float64))
    assert torch.equal(head_norm(torch.zeros_like(h), weight, eps=1e-6), torch.zeros(B, S, NH * DV).double())


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_normalised_in_float32_even_under_autocast(weight_dtype):
    h, weight = (x.detach() for x in make_inputs(torch.bfloat16))
    expected = head_norm(h.float(), weight.float(), eps=1e-6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = head_norm(h, weight.to(weight_dtype), eps=1e-6)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


def test_mistakes_are_named():
    h, weight = make_inputs()
    with pytest.raises(ValueError, match=r"h \[B, S, NH, DV\] and weight \[NH \* DV\], got .* and \(8,\)"):
        head_norm(h, weight[:DV], eps=1e-6)
    with pytest.raises(ValueError, match=r"got \(2, 7, 24\)"):
        head_norm(h.flatten(2), weight, eps=1e-6)


def make_gated_inputs(dtype=torch.float64):
    h, weight = make_inputs(dtype)
    return [h, (2 * torch.randn(B, S, NH * DV)).to(dtype).requires_grad_(), weight]


def test_the_gate_multiplies_the_norm():
    inputs = make_gated_inputs()
    h, gate_preact, weight = inputs
    actual = gated_head_norm(h, gate_preact, weight, eps=1e-6)
    expected = torch.sigmoid(gate_preact) * head_norm(h, weight, eps=1e-6)
    cotangent = torch.randn_like(expected)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_gated_norm_is_rounded_once():
    h, gate_preact, weight = (x.detach() for x in make_gated_inputs(torch.bfloat16))
    expected = gated_head_norm(h.float(), gate_preact.float(), weight.float(), eps=1e-6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated_head_norm(h, gate_preact, weight, eps=1e-6), expected)


def test_mistakes_with_the_gate_are_named():
    h, gate_preact, weight = make_gated_inputs()
    with pytest.raises(ValueError, match=r"gate_preact \[B, S, NH \* DV\] .* \(2, 7, 3, 8\), \(2, 7, 23\) and \(24,\)"):
        gated_head_norm(h, gate_preact[..., 1:], weight, eps=1e-6)
    with pytest.raises(ValueError, match="unknown head norm backend 'cuda'; use one of auto, reference, triton"):
        gated_head_norm(h, gate_preact, weight, eps=1e-6, backend="cuda")
    with pytest.raises(ValueError, match="head norm backend 'triton' needs a CUDA device .* are on 'cpu'"):
        gated_head_norm(h, gate_preact, weight, eps=1e-6, backend="triton")
