"""The fused head norm and its gated form against the references in float64, forward and backward.

Axes: B batch, S sequence, NH heads, DV value dimension of a head.
"""

import pytest
import torch

from kernels.head_norm import MAX_HEAD_DIM, gated_head_norm, head_norm
from tests.kernels.cases import assert_close, relative_error
from tests.kernels.triton_cases import COMPILED, DEVICE, DTYPES, far_heads, padded, strided

# Of the output and of the gradients, by dtype: rounding of the result alone.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
HEAD_DIMS = [16, 48, 64, 96, 128, 192, 256, 384, 512, 1024]
NAMES = ("h", "gate_preact", "weight")


def make_inputs(dtype, head_dim=48, *, batch=2, length=37, heads=3, scale=1.0):
    """h, gate_preact and weight, leaves, with values that dtype holds."""
    torch.manual_seed(0)
    h = scale * torch.randn(batch, length, heads, head_dim) + 2 * scale
    gate_preact, weight = 2 * torch.randn(batch, length, heads * head_dim), torch.randn(heads * head_dim)
    return [x.to(DEVICE, dtype).requires_grad_() for x in (h, gate_preact, weight)]


def plain(h, gate_preact, weight, **kwargs):
    return head_norm(h, weight, **kwargs)


FUNCTIONS = pytest.mark.parametrize("function", [plain, gated_head_norm], ids=["norm", "gated"])


def outputs_and_gradients(function, inputs, *, eps=1e-6, backend, cotangent=None):
    y = function(*inputs, eps=eps, backend=backend)
    if cotangent is None:
        generator = torch.Generator().manual_seed(7)
        cotangent = torch.randn(y.shape, generator=generator).to(y.device, inputs[0].dtype)
    wanted = dict(zip(NAMES, inputs, strict=True))
    if function is plain:
        del wanted["gate_preact"]
    gradients = torch.autograd.grad(y, list(wanted.values()), cotangent.to(y.dtype))
    return {"y": y} | {f"d {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


def exact(function, inputs, **kwargs):
    double = [x.detach().double().requires_grad_() for x in inputs]
    return outputs_and_gradients(function, double, backend="reference", **kwargs)


def check(function, inputs, dtype, **kwargs):
    actual = outputs_and_gradients(function, inputs, backend="triton", **kwargs)
    wanted = dict(zip(NAMES, inputs, strict=True))
    for name, value in actual.items():
        same = wanted[name.removeprefix("d ")] if name != "y" else inputs[0]
        assert value.dtype == same.dtype and (name == "y" or value.shape == same.shape)
    cotangent = kwargs.pop("cotangent", None)
    assert_close(actual, exact(function, inputs, cotangent=cotangent, **kwargs), TOLERANCES[dtype])
    return actual


@FUNCTIONS
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_equals_the_reference(function, head_dim, dtype):
    if not COMPILED and (HEAD_DIMS.index(head_dim) + DTYPES.index(dtype)) % 2:
        pytest.skip("all is computed in float32: under the interpreter, a head dimension has one of the two dtypes")
    check(function, make_inputs(dtype, head_dim, length=11), dtype)


@FUNCTIONS
@pytest.mark.parametrize("batch, length", [(1, 1), (3, 1), (1, 2), (1, 63), (1, 64), (1, 65), (2, 129)])
def test_any_number_of_tokens(function, batch, length):
    check(function, make_inputs(torch.float32, batch=batch, length=length), torch.float32)


@FUNCTIONS
# What an mLSTM puts out at initialisation, where eps matters.
@pytest.mark.parametrize("scale", [1.0, 3e-4])
def test_the_epsilon_counts(function, scale):
    inputs = make_inputs(torch.float32, scale=scale)
    larger = check(function, inputs, torch.float32, eps=1e-5)["y"]
    assert relative_error(larger, check(function, inputs, torch.float32, eps=1e-6)["y"]) > (0.5 if scale < 1 else 1e-8)


@FUNCTIONS
@pytest.mark.parametrize("view", [padded, strided])
def test_inputs_and_gradients_may_be_strided(function, view):
    inputs = make_inputs(torch.float32)
    expected = outputs_and_gradients(function, inputs, backend="triton")
    cotangent = view(torch.randn(2, 37, 3 * 48, generator=torch.Generator().manual_seed(7)).to(DEVICE))
    actual = outputs_and_gradients(function, [view(x) for x in inputs], backend="triton", cotangent=cotangent)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@FUNCTIONS
def test_heads_may_be_far_apart(function):
    h, *others = make_inputs(torch.float16, 16, batch=1, length=3)
    expected = outputs_and_gradients(function, [h, *others], backend="triton")
    actual = outputs_and_gradients(function, [far_heads(h), *others], backend="triton")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@FUNCTIONS
def test_runs_are_bitwise_equal_and_tokens_independent(function):
    inputs = make_inputs(torch.float32, batch=3)
    first = outputs_and_gradients(function, inputs, backend="triton")
    again = outputs_and_gradients(function, inputs, backend="triton")
    assert all(torch.equal(again[name], value) for name, value in first.items())
    h, gate_preact, weight = inputs
    alone = function(h[1:2], gate_preact[1:2], weight, eps=1e-6, backend="triton")
    assert torch.equal(alone, first["y"][1:2])


@FUNCTIONS
def test_a_weight_may_have_more_precision(function, dtype):
    h, gate_preact, weight = make_inputs(dtype)
    check(function, [h, gate_preact, weight.detach().float().requires_grad_()], dtype)


def test_a_saturated_gate_has_no_gradient_and_no_nan():
    h, gate_preact, weight = make_inputs(torch.float32)
    huge = (1e4 * gate_preact.detach().sign()).requires_grad_()
    results = outputs_and_gradients(gated_head_norm, [h, huge, weight], backend="triton")
    assert all(value.isfinite().all() for value in results.values())
    assert not results["d gate_preact"].any()


@FUNCTIONS
def test_is_registered_with_torch(function):
    from kernels.head_norm import fused

    h, gate_preact, weight = make_inputs(torch.float32, 16, length=5)
    if function is plain:
        torch.library.opcheck(fused.head_norm, (h, weight, 1e-6))
    else:
        torch.library.opcheck(fused.gated_head_norm, (h, gate_preact, weight, 1e-6))


@FUNCTIONS
def test_compiles_as_one_graph(function):
    inputs = make_inputs(torch.float32, 16, length=5)
    expected = outputs_and_gradients(function, inputs, backend="triton")
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if COMPILED else "aot_eager")
    y = compiled(*inputs, eps=1e-6, backend="triton")
    assert torch.equal(y, expected["y"])


@FUNCTIONS
def test_what_it_cannot_do_is_refused(function):
    with pytest.raises(ValueError, match="head norm backend 'triton' cannot do this: .* a tensor is float64"):
        function(*make_inputs(torch.float64), eps=1e-6, backend="triton")
    with pytest.raises(ValueError, match=f"head dimension {MAX_HEAD_DIM + 16} is above {MAX_HEAD_DIM}"):
        function(*make_inputs(torch.float32, MAX_HEAD_DIM + 16, length=1), eps=1e-6, backend="triton")
