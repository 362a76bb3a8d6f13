"""GLA, RetNet, Mamba-2 and Gated DeltaNet as layers of a model. Axes: B batch, S sequence."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from kernels.preflight import LinearRecurrenceCase
from model.accounting import count_parameters, decoding_flops_per_token, forward_flops, parameter_shapes, state_elements
from model.config import ModelConfig, validate_model
from model.generation import generate
from model.hardware import Hardware
from model.huggingface.formats import inexpressible
from model.initialisation import initialise
from model.language_model import LanguageModel
from model.layers import KernelUse, layer_kind, sequence_problems
from model.layers.retnet import log_decays
from model.state import named_tensors
from tests.model.conftest import SEVEN_B, model_in_play

SETTINGS = {
    "gla": {"n_heads": 2, "decay_rank": 4},
    "retnet": {"n_heads": 2},
    "mamba2": {"head_dim": 16, "state_dim": 8, "n_groups": 2},
    "gated_deltanet": {"n_heads": 2},
}
CONFIGS = {
    name: ModelConfig(**{**SEVEN_B, "ffn_dim": None if name == "mamba2" else 48}, block=name, layers={name: settings})
    for name, settings in SETTINGS.items()
}


@pytest.fixture(params=sorted(CONFIGS))
def config(request) -> ModelConfig:
    return CONFIGS[request.param]


def losses_and_gradients(model, batch, **state):
    model.zero_grad()
    output = model(**batch, **state)
    output.token_losses.sum().backward()
    return output, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_parameters_are_those_of_the_table_and_all_of_them_learn(config, make_batch):
    model = model_in_play(config)
    assert list(parameter_shapes(config).items()) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())
    _, gradients = losses_and_gradients(model, make_batch())
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@torch.no_grad()
def test_token_by_token_is_one_pass(config, make_batch):
    model, batch = model_in_play(config), make_batch()
    tokens, starts = batch["tokens"], batch["document_start"]
    for given in (starts, None):
        whole = model(tokens, document_start=given, return_state=True)
        state, pieces, place = None, [], 0
        for length in (5, *[1] * (tokens.shape[1] - 5)):
            cut = slice(place, place + length)
            marks = None if given is None else given[:, cut]
            output = model(tokens[:, cut], document_start=marks, state=state, return_state=True)
            state, place = output.state.for_decoding(), place + length
            pieces.append(output.logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole.logits, rtol=1e-10, atol=1e-10)
        for (name, ours), (_, theirs) in zip(named_tensors(state), named_tensors(whole.state), strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_document_knows_no_bit_of_the_one_before(config, make_batch, dtype):
    model, batch = model_in_play(config, dtype), make_batch()
    first_document = (batch["document_start"].cumsum(1) == 1) & torch.tensor([[True], [False]])
    batch["targets"] = batch["targets"].masked_fill(first_document, -100)
    others = {**batch, "tokens": torch.where(first_document, (batch["tokens"] + 17) % 61, batch["tokens"])}
    (one, gradients), (other, other_gradients) = (losses_and_gradients(model, given) for given in (batch, others))
    assert torch.equal(one.token_losses, other.token_losses)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name
    alone = model(batch["tokens"][:1, 14:]).logits
    packed = model(batch["tokens"], document_start=batch["document_start"]).logits[:1, 14:]
    tolerance = 1e-9 if dtype == torch.float64 else 0.2
    torch.testing.assert_close(packed, alone, rtol=0, atol=tolerance)


def silu_conv(x, conv):
    """One document, tap by tap."""
    padded = F.pad(x, (0, 0, 3, 0))
    taps = sum(padded[:, tap : tap + x.shape[1]] * conv.weight[:, 0, tap] for tap in range(4))
    return F.silu(taps + conv.bias)


def head_norm(h, weight):
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return h.flatten(-2) * weight


def rms_norm(h, weight):
    return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def all_pairs(q, k, v, decay):
    """sum over s <= t of (q[t] prod of decays behind s, up to t) . k[s] v[s]; decay [B, S, NH] or [B, S, NH, DK]."""
    length = q.shape[1]
    decay = decay[..., None].expand_as(k) if decay.dim() == 3 else decay
    y = torch.zeros_like(v)
    for t in range(length):
        for s in range(t + 1):
            kept = decay[:, s + 1 : t + 1].prod(dim=1)
            y[:, t] += (q[:, t] * kept * k[:, s]).sum(-1, keepdim=True) * v[:, s]
    return y


@pytest.fixture
def layer_and_input():
    def make(name):
        x = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return model_in_play(CONFIGS[name]).blocks[0].mixer, x

    return make


@torch.no_grad()
def test_gla_as_its_paper_writes_it(layer_and_input):
    layer, x = layer_and_input("gla")
    q, k, v = (F.linear(x, p.weight).unflatten(-1, (2, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    low = x @ layer.decay_down.weight.T @ layer.decay_up.T + layer.decay_bias
    h = all_pairs(q, k, v, torch.sigmoid(low).pow(1 / 16).unflatten(-1, (2, -1))) / 8**0.5
    gated = F.silu(x @ layer.output_gate.weight.T) * head_norm(h, layer.head_norm.weight)
    torch.testing.assert_close(layer(x, None, None, False)[0], gated @ layer.out_proj.weight.T)


@torch.no_grad()
def test_retnet_as_its_paper_writes_it(layer_and_input):
    layer, x = layer_and_input("retnet")
    q, k, v = (F.linear(x, p.weight).unflatten(-1, (2, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    # Positions as products with complex numbers.
    angle = torch.arange(7)[:, None] * 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k = (torch.complex(*part.chunk(2, dim=-1)) * turn for part in (q, k))
    q, k = (torch.cat([part.real, part.imag], dim=-1) for part in (q, k))
    decay = torch.tensor([1 - 2**-5, 1 - 2**-6], dtype=torch.float64).expand(2, 7, 2)
    h = all_pairs(q, k, v, decay) / 16**0.5
    gated = F.silu(x @ layer.output_gate.weight.T) * head_norm(h, layer.head_norm.weight)
    torch.testing.assert_close(layer(x, None, None, False)[0], gated @ layer.out_proj.weight.T)


@torch.no_grad()
def test_mamba2_as_its_paper_writes_it(layer_and_input):
    """As a state-space model: h[t] = exp(A step) h[t - 1] + step B x, y = C h + D x, a head at a time."""
    layer, x = layer_and_input("mamba2")
    z, xbc, step = F.linear(x, layer.in_proj.weight).split([64, 64 + 2 * 16, 4], dim=-1)
    xbc, step = silu_conv(xbc, layer.conv), F.softplus(step + layer.step_bias)
    outputs = []
    for head in range(4):
        group = slice(8 * (head // 2), 8 * (head // 2) + 8)
        inner, b, c = xbc[..., 16 * head : 16 * head + 16], xbc[..., 64:80][..., group], xbc[..., 80:][..., group]
        h, found = torch.zeros(2, 16, 8, dtype=torch.float64), []
        for t in range(7):
            decay = torch.exp(-layer.log_rate[head].exp() * step[:, t, head])[:, None, None]
            h = decay * h + step[:, t, head, None, None] * inner[:, t, :, None] * b[:, t, None]
            found.append((h * c[:, t, None]).sum(-1) + layer.skip[head] * inner[:, t])
        outputs.append(torch.stack(found, dim=1))
    gated = torch.cat(outputs, dim=-1) * F.silu(z)
    expected = rms_norm(gated, layer.norm.weight) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x, None, None, False)[0], expected)


@torch.no_grad()
def test_gated_deltanet_as_its_paper_writes_it(layer_and_input):
    """S[t] = S[t - 1] (a (I - b k k^T)) + b v k^T with values as rows, o = S q."""
    layer, x = layer_and_input("gated_deltanet")
    qkv = silu_conv(F.linear(x, layer.qkv_proj.weight), layer.conv)
    q, k, v = (part.unflatten(-1, (2, -1)) for part in qkv.split([24, 24, 48], dim=-1))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    step = F.softplus(F.linear(x, layer.step_proj.weight) + layer.step_bias)
    decay, beta = torch.exp(-layer.log_rate.exp() * step), torch.sigmoid(F.linear(x, layer.beta_proj.weight))
    h = torch.zeros_like(v)
    for row in range(2):
        for head in range(2):
            memory = torch.zeros(24, 12, dtype=torch.float64)
            for t in range(7):
                key, b = k[row, t, head], beta[row, t, head]
                memory = memory @ (decay[row, t, head] * (torch.eye(12) - b * torch.outer(key, key)))
                memory = memory + b * torch.outer(v[row, t, head], key)
                h[row, t, head] = memory @ q[row, t, head] / 12**0.5
    gated = F.silu(x @ layer.output_gate.weight.T) * rms_norm(h, layer.norm.weight).flatten(-2)
    torch.testing.assert_close(layer(x, None, None, False)[0], gated @ layer.out_proj.weight.T)


def test_first_values_are_those_of_the_papers():
    for name in ("mamba2", "gated_deltanet"):
        model = LanguageModel(CONFIGS[name])
        initialise(model, seed=0)
        layer = model.blocks[0].mixer
        assert layer.log_rate.exp().min() >= 1 and layer.log_rate.exp().max() <= 16
        steps = F.softplus(layer.step_bias)
        assert steps.min() >= 0.99e-3 and steps.max() <= 0.101
        if name == "mamba2":
            assert torch.equal(layer.skip, torch.ones(4))
    exponents = torch.log2(1 - log_decays(4, torch.zeros(1, dtype=torch.float64)).exp())
    torch.testing.assert_close(exponents, -torch.arange(5.0, 9.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_those_that_the_layer_keeps(config, dtype):
    """The norm before it, which the estimate has too, does not run here."""
    wide = dataclasses.replace(config, d_model=128, n_blocks=1)
    model = model_in_play(wide, dtype)
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), (tensor.untyped_storage().nbytes(), tensor))
        return tensor

    x, starts = torch.randn(8, 32, 128, dtype=dtype, requires_grad=True), torch.zeros(8, 32, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.blocks[0].mixer(x, starts, None, False)
    kind = layer_kind(wide, wide.block)
    estimate = 8 * 32 * (kind.activation_bytes(wide, 32, Hardware(compute_bytes=dtype.itemsize)) - dtype.itemsize * 128)
    assert estimate == pytest.approx(sum(size for size, _ in kept.values()), rel=0.08)
    on_gpu = kind.activation_bytes(wide, 2048, Hardware("NVIDIA H200"))
    assert on_gpu < kind.activation_bytes(wide, 2048, Hardware())


def test_gradients_flow_through_a_state(config, make_batch):
    model, batch = model_in_play(config), make_batch()
    _, whole = losses_and_gradients(model, batch)
    model.zero_grad()
    first, second = ({key: value[:, cut] for key, value in batch.items()} for cut in (slice(0, 9), slice(9, None)))
    output = model(**first, return_state=True)
    (output.token_losses.sum() + model(**second, state=output.state).token_losses.sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-9, atol=1e-9)


def test_states_and_decays_are_float32_in_a_bfloat16_model(config, make_batch):
    model, batch = model_in_play(config, torch.bfloat16), make_batch()
    state = model(batch["tokens"], return_state=True).state
    assert all(block.memory.dtype == torch.float32 for block in state.blocks)
    exact = model_in_play(config)
    exact.load_state_dict(model.state_dict())
    difference = exact(**batch).token_losses - model(**batch).token_losses
    assert difference.abs().mean() < 0.05


def test_the_state_is_as_large_as_it_says(config):
    state = model_in_play(config)(torch.zeros(1, 5, dtype=torch.int64), return_state=True).state
    numels = []
    state.map(lambda tensor: numels.append(tensor.numel() if tensor.is_floating_point() else 0) or tensor)
    elements = state_elements(config)
    assert sum(numels) == elements["recurrent"] + elements["convolution"]
    assert elements["window"] == elements["cache_per_token"] == 0


def test_a_tiny_model_learns(config):
    model = LanguageModel(config)
    initialise(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.arange(24).repeat(2, 1) % 7
    losses = []
    for _ in range(20):
        loss = model(tokens[:, :-1], targets=tokens[:, 1:]).token_losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(61), rel=0.1) and losses[-1] < 0.6 * losses[0]


@torch.no_grad()
def test_generation_continues_as_the_full_forward_would(config):
    model, prompt = model_in_play(config), torch.arange(7)[None]
    text = torch.cat([prompt, generate(model, prompt, max_new_tokens=6, temperature=0)], dim=1)
    assert torch.equal(model(text[:, :-1]).logits.argmax(-1)[:, 6:], text[:, 7:])


def test_what_cannot_be_is_refused_with_words(config):
    name = config.block
    assert sequence_problems(config, 2) == [f"{name} blocks cannot share a sequence among 2 ranks; use one"]
    assert inexpressible(config)[0].startswith(f"{name} blocks at [0, 1]: all blocks are mLSTM blocks there")


def test_a_pass_costs_the_recurrent_form_and_its_kernels_are_checked(config):
    kind = layer_kind(config, config.block)
    heads = kind.heads(config)
    of_token = 2 * heads.count * heads.key_dim * heads.value_dim * (7 if config.block == "gated_deltanet" else 5)
    extra = 2 * heads.count * 2 * heads.value_dim if config.block == "gated_deltanet" else 0
    assert forward_flops(config, 10)["linear recurrence"] == 10 * (of_token + extra)
    assert decoding_flops_per_token(config) == sum(forward_flops(config, 1).values())
    cases = kind.kernel_cases(config, KernelUse(torch.bfloat16, torch.float32, {2: True}))
    assert [case for case in cases if isinstance(case, LinearRecurrenceCase)] == [
        LinearRecurrenceCase(
            heads.count, heads.key_dim, heads.value_dim, torch.bfloat16, heads.per_feature, heads.delta_rule
        )
    ]


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("gla", {"n_heads": 3}, "qk_dim_factor 0.5); choose a divisor"),
        ("gla", {"decay_rank": 0}, "decay_rank: is 0; it must be a positive number"),
        ("gla", {"backend": "triton"}, "backend: unknown value 'triton'; choose one of auto, reference, fla"),
        ("retnet", {"n_heads": 32}, "rotary positions need an even width of keys"),
        ("mamba2", {"head_dim": 24}, "head_dim: 24 does not divide the inner width 64 (d_model 32 x expand 2.0)"),
        ("mamba2", {"n_groups": 3}, "n_groups: 3 do not divide the 4 heads"),
        ("mamba2", {"conv_kernel_size": 1}, "conv_kernel_size: is 1; a convolution needs at least 2 taps"),
        ("gated_deltanet", {"v_dim_factor": 0.0}, "v_dim_factor: 0.0 gives a width of 0; choose a positive factor"),
    ],
)
def test_one_problem_is_named_with_its_key_value_and_remedy(name, change, expected):
    config = ModelConfig(
        **{**SEVEN_B, "ffn_dim": CONFIGS[name].ffn_dim}, block=name, layers={name: {**SETTINGS[name], **change}}
    )
    problems = validate_model(config)
    assert problems and problems[0].startswith(f"model.layers.{name}.") and expected in problems[0], problems
