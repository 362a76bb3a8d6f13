"""The fused products of a decoding step against the reference in float64.

Axes: M rows, D model width, F inner width, NH heads, DV value dimension of a head.
"""

import pytest
import torch

from kernels import decoding
from kernels.decoding import MAX_ROWS, MixerWeights, NormWeights, tiles
from tests.kernels.cases import assert_close
from tests.kernels.triton_cases import COMPILED, DEVICE, padded

# The interpreter multiplies matrices rightly in float32 alone. bfloat16: results are rounded to it, and so is what
# enters the products, which is one rounding more or less than that of the reference where a value is halfway.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
DTYPES = [torch.float32, torch.bfloat16] if COMPILED else [torch.float32]
ROWS = pytest.mark.parametrize("rows", [1, 3, 8, 17, 64])
# The width of the model, of a head's values, of its keys, and of the feed-forward layer; no multiple of any tile.
WIDTHS = pytest.mark.parametrize("width, value_dim, key_dim, inner", [(136, 24, 20, 200), (1100, 64, 40, 72)])
HEADS = 3
EPS = 1e-5


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


def random(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape)).to(DEVICE, dtype)


def matrix(outputs, inputs, dtype):
    return random(outputs, inputs, dtype=dtype, scale=inputs**-0.5)


def rms_norm(width, dtype):
    return NormWeights(1 + random(width, dtype=dtype, scale=0.2), EPS)


def exact(argument):
    """The same in float64."""
    if isinstance(argument, torch.Tensor):
        return argument.double()
    return type(argument)(*map(exact, argument)) if isinstance(argument, tuple) else argument


def check(function, arguments, dtype):
    actual = function(*arguments, backend="triton")
    expected = function(*map(exact, arguments), backend="reference")
    if isinstance(actual, torch.Tensor):
        actual, expected = {"y": actual}, {"y": expected}
    else:
        actual, expected = actual._asdict(), expected._asdict()
    assert_close(actual, expected, TOLERANCES[dtype])
    return actual


def mixer_weights(width, value_dim, key_dim, dtype):
    sizes = {"q": key_dim, "k": key_dim, "v": value_dim, "output_gate": value_dim}
    weights = {name: matrix(HEADS * size, width, dtype) for name, size in sizes.items()}
    for gate in ("igate", "fgate"):
        weights |= {gate: matrix(HEADS, width, dtype), f"{gate}_bias": random(HEADS, dtype=dtype, scale=3)}
    return MixerWeights(**weights)


@ROWS
@WIDTHS
@pytest.mark.parametrize("cap", [2.0, None])
def test_mixer_inputs(rows, width, value_dim, key_dim, inner, cap, dtype):
    torch.manual_seed(0)
    weights = mixer_weights(width, value_dim, key_dim, dtype)
    found = check(
        decoding.mixer_inputs, (random(rows, width, dtype=dtype), rms_norm(width, dtype), weights, cap), dtype
    )
    assert found["features"].dtype == dtype and found["gates"].dtype == torch.float32


@ROWS
@WIDTHS
def test_mixer_output(rows, width, value_dim, key_dim, inner, dtype):
    torch.manual_seed(0)
    h = random(rows, HEADS, value_dim, dtype=dtype) + 2
    # As it lies beside the queries and others.
    gate_preact = padded(random(rows, HEADS * value_dim, dtype=dtype))
    norm, weight = rms_norm(HEADS * value_dim, dtype), matrix(width, HEADS * value_dim, dtype)
    residual = random(rows, width, dtype=dtype)
    assert check(decoding.mixer_output, (h, gate_preact, norm, weight, residual), dtype)["y"].dtype == dtype


@ROWS
@WIDTHS
def test_swiglu(rows, width, value_dim, key_dim, inner, dtype):
    torch.manual_seed(0)
    x, norm = random(rows, width, dtype=dtype), rms_norm(width, dtype)
    weights = matrix(inner, width, dtype), matrix(inner, width, dtype)
    assert check(decoding.swiglu, (x, norm, *weights), dtype)["y"].dtype == dtype


@ROWS
@WIDTHS
def test_added_product(rows, width, value_dim, key_dim, inner, dtype):
    torch.manual_seed(0)
    x, weight, residual = random(rows, width, dtype=dtype), matrix(inner, width, dtype), random(rows, inner)
    assert check(decoding.added_product, (x, weight, residual.to(dtype)), dtype)["y"].dtype == dtype


@ROWS
@WIDTHS
@pytest.mark.parametrize("cap", [2.0, None])
def test_logits(rows, width, value_dim, key_dim, inner, cap, dtype):
    torch.manual_seed(0)
    x, norm, weight = random(rows, width, dtype=dtype), rms_norm(width, dtype), matrix(inner, width, dtype)
    assert check(decoding.logits, (x, norm, weight, cap), dtype)["y"].dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 3])
def test_weights_in_many_pieces(rows, monkeypatch, dtype):
    monkeypatch.setattr(tiles, "choose", lambda *arguments, **named: tiles.Tile(16, 32, 4, 3))
    test_mixer_inputs(rows, 136, 24, 20, 0, 2.0, dtype)
    test_swiglu(rows, 136, 0, 0, 200, dtype)
    test_added_product(rows, 136, 0, 0, 200, dtype)
    test_logits(rows, 136, 0, 0, 200, 2.0, dtype)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_row_does_not_depend_on_others_and_is_read_inside_its_edges(rows):
    torch.manual_seed(0)
    x, weight, residual = random(rows, 200), matrix(40, 200, torch.float32), random(rows, 40)
    y = decoding.added_product(x, weight, residual, backend="triton")
    x_inside, residual_inside = padded(x), residual.clone()
    assert torch.equal(decoding.added_product(x_inside, weight, residual_inside, backend="triton"), y)
    assert torch.equal(residual_inside, residual)


@pytest.mark.parametrize("rows", [1, 3])
def test_operators_are_registered_with_torch(rows):
    from kernels.decoding import fused

    torch.manual_seed(0)
    dtype = torch.float32
    x, norm, weights = random(rows, 40), rms_norm(40, dtype), mixer_weights(40, 16, 16, dtype)
    residual, square = random(rows, 40), matrix(40, 48, dtype)
    h, gate_preact = random(rows, HEADS, 16), random(rows, HEADS * 16)
    up, gate = matrix(48, 40, dtype), matrix(48, 40, dtype)
    for operation, arguments in [
        (fused.mixer_inputs, (x, *norm, *weights, 15.0)),
        (fused.mixer_output, (h, gate_preact, *rms_norm(48, dtype), square, residual)),
        (fused.swiglu, (x, *norm, gate, up)),
        (fused.added_product, (random(rows, 48), square, residual)),
        (fused.logits, (x, *norm, up, None)),
    ]:
        torch.library.opcheck(operation.definition, arguments)


def test_what_it_cannot_do_is_refused():
    x, weight, residual = random(2, 32), random(16, 32), random(2, 16)
    with pytest.raises(ValueError, match="decoding backend 'triton' cannot do this: .* a tensor is float64"):
        decoding.added_product(x.double(), weight.double(), residual.double(), backend="triton")
    with pytest.raises(ValueError, match="the inputs and the weights must have one dtype"):
        decoding.added_product(x.half(), weight, residual, backend="triton")
    with pytest.raises(ValueError, match="the weights must be contiguous"):
        decoding.added_product(x, random(32, 16).t(), residual, backend="triton")
    many = MAX_ROWS + 1
    with pytest.raises(ValueError, match=f"there are {many} rows, and it takes 1 to {MAX_ROWS}"):
        decoding.added_product(random(many, 32), weight, random(many, 16), backend="triton")
    with pytest.raises(ValueError, match=r"added_product needs x \[M, F\], weight \[D, F\] and residual \[M, D\]"):
        decoding.added_product(x, random(16, 31), residual)
    with pytest.raises(ValueError, match=r"norm and weights must be as wide as the input \(2, 32\)"):
        decoding.logits(x, rms_norm(31, torch.float32), weight, None)
    with pytest.raises(ValueError, match="gate_weight and up_weight must have one shape, got"):
        decoding.swiglu(x, rms_norm(32, torch.float32), weight, random(8, 32))
