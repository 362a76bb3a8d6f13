"""The fused cross-entropy and the soft cap against torch's plain ones. B batch, S sequence, D model, V vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.cross_entropy import MASKED, linear_cross_entropy, linear_cross_entropy_sum
from kernels.soft_cap import soft_cap

B, S, D, V = 2, 11, 6, 50
CAPS = [None, 3.0]


def make_inputs(dtype=torch.float64, masked=True):
    """hidden and weight (leaves) and targets; logits large enough for the cap of 3 to bite."""
    torch.manual_seed(0)
    hidden, weight = 2 * torch.randn(B, S, D), 2 * torch.randn(V, D)
    targets = torch.randint(0, V, (B, S))
    targets[0, 0], targets[1, -1] = V - 1, 0
    if masked:
        targets[0, 3:6] = targets[1, 0] = MASKED
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(hidden, weight, targets, cap):
    logits = hidden @ weight.T
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=MASKED)


def with_gradients(losses, hidden, weight):
    cotangent = torch.randn(losses.shape, generator=torch.Generator().manual_seed(7)).to(losses.dtype)
    return [losses, *torch.autograd.grad(losses, [hidden, weight], cotangent)]


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 21, 22, 2048])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_torch_cross_entropy(masked, chunk_tokens, cap):
    hidden, weight, targets = make_inputs(masked=masked)
    expected = with_gradients(plain(hidden, weight, targets, cap), hidden, weight)
    losses = linear_cross_entropy(hidden, weight, targets, soft_cap=cap, chunk_tokens=chunk_tokens)
    assert losses.shape == (B, S)
    for a, b in zip(with_gradients(losses, hidden, weight), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cap", CAPS)
def test_gradients_equal_finite_differences(cap):
    hidden, weight, targets = make_inputs()
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, soft_cap=cap, chunk_tokens=5),
        (hidden, weight),
    )


def test_masked_tokens_have_no_loss_and_no_gradient_even_if_not_finite():
    hidden, weight, targets = make_inputs()
    clean = with_gradients(linear_cross_entropy(hidden, weight, targets, chunk_tokens=4), hidden, weight)
    masked = targets == MASKED
    assert torch.equal(clean[0][masked], torch.zeros(int(masked.sum()), dtype=torch.float64))
    assert torch.equal(clean[1][masked], torch.zeros_like(clean[1][masked]))
    broken = hidden.detach().masked_fill(masked[..., None], torch.nan).requires_grad_()
    dirty = with_gradients(linear_cross_entropy(broken, weight, targets, chunk_tokens=4), broken, weight)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_all_masked():
    hidden, weight, targets = make_inputs()
    losses = linear_cross_entropy(hidden, weight, torch.full_like(targets, MASKED))
    assert torch.equal(losses, torch.zeros(B, S, dtype=torch.float64))
    for gradient in torch.autograd.grad(losses.sum(), [hidden, weight]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("cap", [None, 30.0])
def test_huge_logits_stay_finite(cap):
    hidden, weight, targets = make_inputs(torch.float32)
    for value in with_gradients(linear_cross_entropy(1e4 * hidden, weight, targets, soft_cap=cap), hidden, weight):
        assert value.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Watches every operation for the largest tensor that it makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_never_holds_the_logits_of_more_than_one_chunk():
    torch.manual_seed(0)
    tokens, width, vocabulary, chunk = 512, 4, 300, 32
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (1, tokens))
    saved = []

    def note(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), LargestTensor() as largest:
        losses = linear_cross_entropy(hidden, weight, targets, soft_cap=30.0, chunk_tokens=chunk)
        losses.sum().backward()
    assert saved
    # All that is kept: hidden, weight, targets and one number for each token.
    assert sum(saved) <= hidden.numel() + weight.numel() + 2 * tokens
    assert largest.numel == chunk * vocabulary
    # The watch does see logits where they are made.
    with LargestTensor() as plain_largest:
        plain(hidden, weight, targets, 30.0).sum().backward()
    assert plain_largest.numel >= tokens * vocabulary


@pytest.mark.parametrize("cap", CAPS)
def test_bfloat16_products_and_float32_losses(cap):
    hidden, weight, targets = make_inputs(torch.bfloat16)
    losses = linear_cross_entropy(hidden, weight, targets, soft_cap=cap, chunk_tokens=4)
    assert losses.dtype == torch.float32
    # The logits are rounded to bfloat16 once, by the product itself; all after that is float32.
    logits = (hidden.detach() @ weight.detach().T).double()
    expected = F.cross_entropy(soft_cap(logits, cap).transpose(1, 2), targets, reduction="none", ignore_index=MASKED)
    assert torch.allclose(losses.double(), expected, rtol=1e-5, atol=1e-5)
    single = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    references = torch.autograd.grad(plain(*single, targets, cap).sum(), single)
    for gradient, reference in zip(torch.autograd.grad(losses.sum(), [hidden, weight]), references, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - reference).norm() <= 2e-2 * reference.norm()


def test_weight_gradient_does_not_lose_small_chunks_in_bfloat16():
    # One token at a time: summed in bfloat16, 2000 equal contributions would stop growing at 256 times one of them.
    tokens = 2000
    hidden = torch.ones(1, tokens, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    losses = linear_cross_entropy(hidden, weight, torch.zeros(1, tokens, dtype=torch.int64), chunk_tokens=1)
    losses.sum().backward()
    assert torch.equal(weight.grad, torch.tensor([[-1000.0], [1000.0]], dtype=torch.bfloat16))


def test_a_float32_weight_meets_bfloat16_hidden_states():
    hidden, weight, targets = make_inputs(torch.bfloat16)
    single = weight.detach().float().requires_grad_()
    losses = linear_cross_entropy(hidden, single, targets)
    assert torch.equal(losses, linear_cross_entropy(hidden, weight, targets))
    assert torch.autograd.grad(losses.sum(), single)[0].dtype == torch.float32


def test_autocast_changes_nothing():
    hidden, weight, targets = make_inputs(torch.float32)
    expected = with_gradients(linear_cross_entropy(hidden, weight, targets, soft_cap=3.0), hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = with_gradients(linear_cross_entropy(hidden, weight, targets, soft_cap=3.0), hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_wanted_gradients_are_made(frozen):
    hidden, weight, targets = make_inputs()
    arguments = {"hidden": hidden, "weight": weight}
    arguments[frozen] = arguments[frozen].detach()
    (wanted,) = (x for x in arguments.values() if x.requires_grad)
    gradient = torch.autograd.grad(linear_cross_entropy(**arguments, targets=targets).sum(), wanted)[0]
    assert torch.allclose(gradient, torch.autograd.grad(plain(hidden, weight, targets, None).sum(), wanted)[0])


@pytest.mark.parametrize("target", [V, -1, -101])
def test_targets_outside_the_vocabulary_are_refused(target):
    hidden, weight, targets = make_inputs()
    targets[0, 0] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(B, S + 1, dtype=torch.int64)}, r"got \(2, 11, 6\), \(50, 6\) and \(2, 12\)"),
        ({"weight": torch.zeros(V, D + 1)}, r"weight \[V, D\] and targets .* \(50, 7\)"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, not 0"),
        ({"soft_cap": -1.0}, "soft cap must be positive, not -1.0; use null"),
        ({"z_loss_weight": -0.1}, r"z_loss_weight must be 0 \(no z-loss\) or positive, not -0.1"),
        ({"backend": "triton"}, "cross-entropy backend 'triton' needs a CUDA device"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = dict(zip(("hidden", "weight", "targets"), make_inputs(), strict=True))
    for function in (linear_cross_entropy, linear_cross_entropy_sum):
        with pytest.raises(ValueError, match=message):
            function(**(arguments | change))


def test_soft_cap():
    x = torch.linspace(-100, 100, 41, dtype=torch.float64)
    assert soft_cap(x, None) is x
    assert torch.allclose(soft_cap(x, 15.0), 15 * torch.tanh(x / 15))
    assert soft_cap(x, 15.0).abs().max() <= 15
    # Near zero it is the identity.
    assert torch.allclose(soft_cap(1e-4 * x, 15.0), 1e-4 * x, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="a soft cap must be positive, not 0; use null for no cap"):
        soft_cap(x, 0)


@pytest.mark.parametrize("cap", CAPS)
def test_z_loss_is_the_square_of_the_log_sum_exp(cap):
    hidden, weight, targets = make_inputs()
    logits = soft_cap(hidden @ weight.T, cap)
    z_loss = logits.logsumexp(-1).square().masked_fill(targets == MASKED, 0)
    expected = with_gradients(plain(hidden, weight, targets, cap) + 0.1 * z_loss, hidden, weight)
    losses = linear_cross_entropy(hidden, weight, targets, soft_cap=cap, z_loss_weight=0.1, chunk_tokens=4)
    for a, b in zip(with_gradients(losses, hidden, weight), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


def test_the_sum_is_the_sum():
    hidden, weight, targets = make_inputs()
    settings = {"soft_cap": 3.0, "z_loss_weight": 0.1, "chunk_tokens": 4}
    total = linear_cross_entropy_sum(hidden, weight, targets, **settings)
    expected = linear_cross_entropy(hidden, weight, targets, **settings).sum()
    assert torch.equal(total, expected)
    for a, b in zip(
        torch.autograd.grad(total, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]), strict=True
    ):
        assert torch.equal(a, b)
