import pytest
import torch
import torch.nn.functional as F

from kernels.gate_projection import gate_projection, on_tensor_cores


def make(tokens, width, gates, device, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, width, generator=generator)
    weight = torch.randn(gates, width, generator=generator) / width**0.5
    bias = torch.randn(gates, generator=generator)
    return [part.to(device, dtype).requires_grad_() for part in (x, weight, bias)]


def run(function, inputs, grad):
    """The result and the gradients of x, weight and bias."""
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))]


def exact(inputs, grad):
    return run(F.linear, [part.detach().double().requires_grad_() for part in inputs], grad.double())


def error(found, expected):
    return float((found.double() - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_results_are_more_precise_than_bfloat16_inputs(dtype):
    inputs = make(30, 64, 3, "cpu", dtype)
    grad = torch.randn(2, 30, 3)
    assert not on_tensor_cores(*inputs[:2])
    y, *gradients = run(gate_projection, inputs, grad)
    expected, *expected_gradients = exact(inputs, grad)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(y, expected) < 1e-6
    for found, wanted, given in zip(gradients, expected_gradients, inputs, strict=True):
        assert found.dtype == given.dtype and error(found, wanted) < (3e-3 if dtype == torch.bfloat16 else 1e-6)


def test_autocast_does_not_reach_it():
    inputs = make(30, 64, 3, "cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = gate_projection(*inputs)
    assert error(y, exact(inputs, torch.zeros(2, 30, 3))[0]) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width", "gates"), [(8192, 4096, 16), (2048, 2048, 8), (777, 1024, 8), (5, 64, 3)])
def test_tensor_cores_lose_nothing_that_bfloat16_would_keep(tokens, width, gates):
    inputs = make(tokens, width, gates, "cuda", torch.bfloat16)
    grad = torch.randn(2, tokens, gates, device="cuda")
    assert on_tensor_cores(*inputs[:2])
    found = run(gate_projection, inputs, grad)
    expected = exact(inputs, grad)
    # bfloat16 results would be off by 2e-3. Tensor cores add up with a little less than float32's precision.
    assert error(found[0], expected[0]) < 1e-5
    in_float32 = run(lambda x, w, b: F.linear(x.float(), w.float(), b.float()), inputs, grad)
    for mine, reference, wanted in zip(found[1:], in_float32[1:], expected[1:], strict=True):
        assert mine.dtype == torch.bfloat16 and error(mine, wanted) < 1.05 * error(reference, wanted)


@pytest.mark.gpu
def test_is_a_well_behaved_operator():
    from kernels import gate_projection as module

    x, weight, _ = make(40, 64, 8, "cuda", torch.bfloat16)
    torch.library.opcheck(module._project.definition, (x.flatten(0, 1), weight))
