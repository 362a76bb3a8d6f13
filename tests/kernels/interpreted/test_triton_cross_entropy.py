"""The fused cross-entropy against the reference in float64, forward and backward. B batch, S sequence, V vocabulary."""

import pytest
import torch

from kernels.cross_entropy import MASKED, linear_cross_entropy, linear_cross_entropy_sum
from tests.kernels.cases import assert_close, relative_error
from tests.kernels.triton_cases import COMPILED, DEVICE, compiled_only, padded, strided

B, S, D = 2, 11, 16
# Losses, and gradients: the logits and their gradients are rounded to the dtype.
TOLERANCES = {
    torch.float32: {"losses": 1e-6, "d hidden": 2e-6, "d weight": 2e-6},
    torch.float16: {"losses": 6e-4, "d hidden": 1e-3, "d weight": 1e-3},
    torch.bfloat16: {"losses": 4e-3, "d hidden": 6e-3, "d weight": 6e-3},
}
SETTINGS = pytest.mark.parametrize(
    "settings",
    [{}, {"soft_cap": 3.0}, {"z_loss_weight": 0.05}, {"soft_cap": 30.0, "z_loss_weight": 1e-2}],
    ids=["plain", "cap", "z-loss", "cap and z-loss"],
)
NO_TARGETS, SOME, NONE_MASKED, NAN_IN_MASKED = "all masked", "some masked", "none masked", "NaN in masked"


def make_inputs(dtype=torch.float32, vocabulary=50, *, masked=SOME, length=S, width=D):
    """hidden and weight (leaves) and targets; logits large enough for a cap of 3 to bite."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, length, width), torch.randn(vocabulary, width)
    targets = torch.randint(0, vocabulary, (B, length))
    targets[0, 0], targets[1, -1] = vocabulary - 1, 0
    if masked != NONE_MASKED:
        targets[0, 3:6] = targets[1, 0] = MASKED
    if masked == NO_TARGETS:
        targets[:] = MASKED
    if masked == NAN_IN_MASKED:
        hidden[targets == MASKED] = torch.nan
    return hidden.to(DEVICE, dtype).requires_grad_(), weight.to(DEVICE, dtype).requires_grad_(), targets.to(DEVICE)


def token_losses(hidden, weight, targets, **kwargs):
    losses = linear_cross_entropy(hidden, weight, targets, **kwargs)
    cotangent = torch.randn(losses.shape, generator=torch.Generator().manual_seed(7)).to(losses.device, losses.dtype)
    gradients = torch.autograd.grad(losses, [hidden, weight], cotangent)
    return {"losses": losses, "d hidden": gradients[0], "d weight": gradients[1]}


def loss_sum(hidden, weight, targets, **kwargs):
    total = linear_cross_entropy_sum(hidden, weight, targets, **kwargs)
    # No power of two, as 1 / tokens is not.
    gradients = torch.autograd.grad(total / 7, [hidden, weight])
    return {"losses": total, "d hidden": gradients[0], "d weight": gradients[1]}


FORMS = pytest.mark.parametrize("form", [token_losses, loss_sum])


def exact(form, hidden, weight, targets, **kwargs):
    hidden = hidden.detach().masked_fill((targets == MASKED)[..., None], 0)
    return form(hidden.double().requires_grad_(), weight.detach().double().requires_grad_(), targets, **kwargs)


@FORMS
@SETTINGS
def test_equals_the_reference(form, settings, dtype):
    inputs = make_inputs(dtype)
    actual = form(*inputs, backend="triton", **settings)
    assert actual["losses"].dtype == torch.float32
    assert actual["d hidden"].dtype == actual["d weight"].dtype == dtype
    assert_close(actual, exact(form, *inputs, **settings), TOLERANCES[dtype])


@FORMS
# A vocabulary of less than a tile, of exactly one, of one more and of one less, odd and even.
@pytest.mark.parametrize("vocabulary", [2, 17, 4095, 4096, 4097])
def test_any_vocabulary(form, vocabulary):
    inputs = make_inputs(vocabulary=vocabulary)
    actual = form(*inputs, backend="triton", soft_cap=30.0)
    assert_close(actual, exact(form, *inputs, soft_cap=30.0), TOLERANCES[torch.float32])


@FORMS
@pytest.mark.parametrize("chunk_tokens", [1, 4, 21, 22])
def test_any_chunk(form, chunk_tokens):
    inputs = make_inputs()
    actual = form(*inputs, backend="triton", soft_cap=3.0, chunk_tokens=chunk_tokens)
    assert_close(actual, exact(form, *inputs, soft_cap=3.0), TOLERANCES[torch.float32])


@FORMS
@pytest.mark.parametrize("masked", [NO_TARGETS, NONE_MASKED, NAN_IN_MASKED])
def test_masked_tokens_have_no_loss_and_no_gradient(form, masked):
    inputs = make_inputs(masked=masked)
    actual = form(*inputs, backend="triton", soft_cap=3.0, z_loss_weight=0.1, chunk_tokens=4)
    assert_close(actual, exact(form, *inputs, soft_cap=3.0, z_loss_weight=0.1), TOLERANCES[torch.float32])
    hidden, _, targets = inputs
    assert not actual["d hidden"][targets == MASKED].any()
    if masked == NO_TARGETS:
        assert not any(value.any() for value in actual.values())


@FORMS
def test_no_token_has_no_loss_and_no_gradient(form):
    hidden, weight, targets = make_inputs(length=1)
    hidden = hidden.detach()[:0].requires_grad_()
    actual = form(hidden, weight, targets[:0], backend="triton", soft_cap=3.0)
    assert actual["d hidden"].shape == hidden.shape and actual["d weight"].shape == weight.shape
    assert not any(value.any() for value in actual.values())


@FORMS
@pytest.mark.parametrize("settings", [{}, {"soft_cap": 30.0}], ids=["plain", "cap"])
def test_huge_logits_stay_finite(form, settings):
    hidden, weight, targets = make_inputs()
    hidden = (1e4 * hidden.detach()).requires_grad_()
    actual = form(hidden, weight, targets, backend="triton", **settings)
    # Logits of 1e5 are off by 2^-24 of that, and the slope of the cap by 2 / 30 of what they are off by.
    limits = {"losses": 1e-5, "d hidden": 4e-4, "d weight": 4e-4}
    assert_close(actual, exact(form, hidden, weight, targets, **settings), limits)


@FORMS
def test_a_nan_in_a_scored_token_shows(form):
    hidden, weight, targets = make_inputs()
    hidden = hidden.detach().clone()
    hidden[0, 1, 0] = torch.nan
    actual = form(hidden.requires_grad_(), weight, targets, backend="triton", soft_cap=30.0)
    assert actual["losses"].isnan().any() and actual["d weight"].isnan().any()


@FORMS
@pytest.mark.parametrize("view", [padded, strided])
def test_inputs_may_be_strided(form, view):
    hidden, weight, targets = make_inputs()
    expected = form(hidden, weight, targets, backend="triton")
    actual = form(view(hidden), view(weight), view(targets), backend="triton")
    assert_close(actual, expected, 2e-6)


@FORMS
def test_a_weight_may_have_more_precision(form):
    hidden, weight, targets = make_inputs(torch.float16)
    single = weight.detach().float().requires_grad_()
    actual = form(hidden, single, targets, backend="triton")
    assert actual["d weight"].dtype == torch.float32
    assert_close(actual, exact(form, hidden, single, targets), TOLERANCES[torch.float16])


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_sum])
def test_only_wanted_gradients_are_made(function, frozen):
    inputs = dict(zip(("hidden", "weight", "targets"), make_inputs(), strict=True))
    expected = loss_sum(**inputs, backend="reference")
    inputs[frozen] = inputs[frozen].detach()
    (wanted,) = (name for name, x in inputs.items() if x.requires_grad)
    total = function(**inputs, backend="triton").sum()
    actual = torch.autograd.grad(total / 7, inputs[wanted])[0]
    assert relative_error(actual, expected[f"d {wanted}"]) <= 2e-6


def test_without_gradients_the_sum_is_the_same():
    hidden, weight, targets = make_inputs()
    with torch.no_grad():
        total = linear_cross_entropy_sum(hidden, weight, targets, soft_cap=3.0, backend="triton")
    assert torch.equal(total, linear_cross_entropy_sum(hidden, weight, targets, soft_cap=3.0, backend="triton"))
    assert not total.requires_grad


def test_a_factor_of_the_sum_is_not_rounded_to_the_dtype(dtype):
    hidden, weight, targets = make_inputs(dtype)
    total = linear_cross_entropy_sum(hidden, weight, targets, backend="triton")
    # Half-way between two numbers of bfloat16, and a quarter of the way between two of float16. Far from 1, because
    # gradients of hidden that have the dtype already move by whole steps of it or by none: only then do roundings
    # average out (to 0.05 eps or less here), and a rounded factor (0.18 eps off or more) shows.
    factor = 171.5 / 256 + 2**-12
    plain = torch.autograd.grad(total, [hidden, weight], retain_graph=True)
    scaled = torch.autograd.grad(total, [hidden, weight], total.new_tensor(factor))
    for a, b in zip(scaled, plain, strict=True):
        ratio = (a.double() * b.double()).sum() / b.double().square().sum()
        assert abs(ratio - factor) < torch.finfo(dtype).eps / 16


@FORMS
def test_runs_are_bitwise_equal(form):
    inputs = make_inputs()
    first, again = (form(*inputs, backend="triton", soft_cap=3.0) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_token_does_not_depend_on_the_others():
    hidden, weight, targets = make_inputs()
    whole = linear_cross_entropy(hidden, weight, targets, backend="triton", chunk_tokens=S)
    assert torch.equal(linear_cross_entropy(hidden[1:], weight, targets[1:], backend="triton")[0], whole[1])


@pytest.mark.skipif(COMPILED, reason="an assertion on a CUDA device ends the process's use of it")
@pytest.mark.parametrize("target", [50, -1, -101])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_sum])
def test_targets_outside_the_vocabulary_are_refused(function, target):
    hidden, weight, targets = make_inputs()
    targets[0, 0] = target
    with pytest.raises(RuntimeError, match="a target is out of bounds for 50 token ids"):
        function(hidden, weight, targets, backend="triton")


def test_is_registered_with_torch():
    from kernels.cross_entropy import fused

    hidden, weight, targets = make_inputs()
    arguments = (hidden.detach().flatten(0, 1).requires_grad_(), weight, targets.flatten(), 3.0, 0.01, 8)
    torch.library.opcheck(fused.losses_of_tokens.definition, arguments)
    torch.library.opcheck(fused.summed_loss.definition, (*arguments, True, True))


@FORMS
def test_compiles_as_one_graph(form):
    inputs = make_inputs()
    function = linear_cross_entropy if form is token_losses else linear_cross_entropy_sum
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if COMPILED else "aot_eager")
    actual = compiled(*inputs, soft_cap=3.0, backend="triton")
    assert torch.equal(actual, function(*inputs, soft_cap=3.0, backend="triton"))
    actual.sum().backward()
    assert_close({"d": inputs[1].grad}, {"d": exact(loss_sum, *inputs, soft_cap=3.0)["d weight"] * 7}, 2e-6)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_sum])
def test_other_numbers_of_tokens_are_traced_by_symbols(function):
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for length in (3, 5, 7, 11):
        inputs = make_inputs(length=length)
        actual = compiled(*inputs, backend="triton")
    assert len(graphs) <= 2
    assert torch.equal(actual, function(*inputs, backend="triton"))


@compiled_only
@FORMS
def test_a_real_vocabulary(form, dtype):
    inputs = make_inputs(dtype, 50304, length=300, width=512)
    kwargs = {"soft_cap": 30.0, "z_loss_weight": 1e-4}
    actual = form(*inputs, backend="triton", chunk_tokens=256, **kwargs)
    assert_close(actual, exact(form, *inputs, **kwargs), TOLERANCES[dtype])
