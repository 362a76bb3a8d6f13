import dataclasses
import math

import pytest
import torch

from model.config import MLSTMConfig, ModelConfig, SLSTMConfig
from model.initialisation import initialise, initialise_parameter
from model.language_model import LanguageModel

D_MODEL, N_BLOCKS, N_HEADS = 128, 3, 4
SMALL_STD = math.sqrt(2 / (5 * D_MODEL))
WANG_STD = 2 / (N_BLOCKS * math.sqrt(D_MODEL))
SEVEN_B = ModelConfig(d_model=D_MODEL, n_blocks=N_BLOCKS, vocab_size=512, ffn_dim=320, mlstm=MLSTMConfig(N_HEADS))


def initialised(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    model = LanguageModel(config)
    initialise(model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_normal(tensor: torch.Tensor, std: float) -> None:
    """Mean and standard deviation within four standard errors."""
    count = tensor.numel()
    assert abs(tensor.mean().item()) < 4 * std / math.sqrt(count)
    assert abs(tensor.std().item() - std) < 4 * std / math.sqrt(2 * count)


def test_the_7b_block():
    values = initialised(SEVEN_B)
    for name in ("embedding.weight", "lm_head.weight"):
        assert_normal(values[name], SMALL_STD)
    for block in range(N_BLOCKS):
        prefix = f"blocks.{block}."
        for name in ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "ffn.gate_proj", "ffn.up_proj"):
            assert_normal(values[f"{prefix}{name}.weight"], SMALL_STD)
        for name in ("mixer.out_proj", "ffn.down_proj"):
            assert_normal(values[f"{prefix}{name}.weight"], WANG_STD)
        for name in ("mixer.output_gate", "mixer.igate", "mixer.fgate"):
            assert not values[f"{prefix}{name}.weight"].any(), name
        assert torch.equal(values[f"{prefix}mixer.igate.bias"], torch.full((N_HEADS,), -10.0))
        torch.testing.assert_close(values[f"{prefix}mixer.fgate.bias"], torch.tensor([3.0, 4.0, 5.0, 6.0]))
        for name in ("mixer_norm", "ffn_norm", "mixer.head_norm"):
            assert torch.equal(values[f"{prefix}{name}.weight"], torch.ones(D_MODEL)), name
    assert torch.equal(values["out_norm.weight"], torch.ones(D_MODEL))


def test_standard_deviations_of_the_published_7b():
    config = ModelConfig(mlstm=MLSTMConfig())
    query = initialise_parameter(config, "blocks.0.mixer.q_proj.weight", (64, 4096), 0)
    down = initialise_parameter(config, "blocks.31.ffn.down_proj.weight", (32, 10944), 0)
    assert_normal(query, 0.009882)
    assert_normal(down, 0.0009766)
    fgate = initialise_parameter(config, "blocks.0.mixer.fgate.bias", (8,), 0)
    expected = torch.tensor([3, 3.4286, 3.8571, 4.2857, 4.7143, 5.1429, 5.5714, 6])
    torch.testing.assert_close(fgate, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["mlstm", "mixed"])
@pytest.mark.parametrize("d_model", [64, 128])
def test_initial_loss_of_the_7b_family(kind, d_model):
    # rms 1 behind the last norm times a head of variance 2 / (5 d_model) is a logit variance of 0.4 at every width.
    config = ModelConfig(d_model=d_model, n_blocks=3, ffn_dim=2 * d_model, mlstm=MLSTMConfig(n_heads=4))
    if kind == "mixed":
        config = dataclasses.replace(config, slstm_at=[1], slstm=SLSTMConfig(n_heads=4, gate_soft_cap=15.0))
    model = LanguageModel(config)
    initialise(model, seed=5)
    tokens = torch.randint(config.vocab_size, (4, 513), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = model(tokens[:, :-1], targets=tokens[:, 1:]).token_losses
    assert losses.mean().item() == pytest.approx(11.03, abs=0.05)


def test_output_gate_is_one_half_at_the_start():
    model = LanguageModel(SEVEN_B)
    initialise(model, seed=0)
    assert torch.equal(
        torch.sigmoid(model.blocks[0].mixer.output_gate(torch.randn(2, 3, D_MODEL))), torch.full((2, 3, D_MODEL), 0.5)
    )


def test_the_neurips_blocks(small_configs):
    config = dataclasses.replace(small_configs["neurips_mlstm_and_slstm"], d_model=D_MODEL, ffn_dim=192)
    values = initialised(config)
    inner = 2 * D_MODEL
    for name in ("up_proj", "q_proj", "k_proj", "v_proj"):
        assert_normal(values[f"blocks.0.mixer.{name}.weight"], SMALL_STD)
    assert values["blocks.0.mixer.q_proj.weight"].shape == (inner // 4, 4, 4)
    assert_normal(values["blocks.0.mixer.down_proj.weight"], WANG_STD)
    assert torch.equal(values["blocks.0.mixer.learnable_skip"], torch.ones(inner))
    assert not values["blocks.0.mixer.igate.weight"].any() and not values["blocks.0.mixer.fgate.weight"].any()
    assert torch.equal(values["blocks.0.mixer.fgate.bias"], torch.tensor([3.0, 6.0]))
    many_heads = initialise_parameter(config, "blocks.0.mixer.igate.bias", (10_000,), 0)
    assert_normal(many_heads, 0.1)
    conv = values["blocks.0.mixer.conv.weight"]
    assert conv.shape == (inner, 1, 4) and conv.abs().max() <= 0.5
    assert_normal(conv, 1 / math.sqrt(12))
    assert values["blocks.0.mixer.conv.bias"].abs().max() <= 0.5
    assert_normal(values["blocks.1.ffn.up_proj.weight"], SMALL_STD)
    assert_normal(values["blocks.1.ffn.down_proj.weight"], WANG_STD)


def test_the_slstm_layer(small_configs):
    config = dataclasses.replace(small_configs["slstm"], d_model=D_MODEL, n_blocks=N_BLOCKS)
    values = initialised(config)
    for gate in "ifzo":
        assert_normal(values[f"blocks.2.mixer.{gate}gate_proj.weight"], SMALL_STD)
    assert not values["blocks.2.mixer.recurrent_kernel"].any()
    for block, exponent in ((0, 0.3), (1, 0.95), (2, 1.6)):
        bias = values[f"blocks.{block}.mixer.bias"]
        assert not bias[[0, 2, 3]].any()
        unit = torch.arange(D_MODEL // 2) / (D_MODEL // 2 - 1)
        expected = (5 - 12 * unit**exponent).expand(2, -1)
        torch.testing.assert_close(bias[1], expected, atol=1e-5, rtol=1e-5)


def test_attention_starts_like_the_other_mixers(small_configs):
    config = dataclasses.replace(small_configs["attention"], d_model=D_MODEL, n_blocks=N_BLOCKS)
    values = initialised(config)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert_normal(values[f"blocks.0.mixer.{name}.weight"], SMALL_STD)
    assert_normal(values["blocks.0.mixer.out_proj.weight"], WANG_STD)


def test_sinks_start_at_the_softmax_off_by_one(small_configs):
    sinks = initialised(small_configs["attention_window"])["blocks.0.mixer.sinks"]
    assert torch.equal(sinks, torch.zeros(4))


def test_a_parameter_is_a_pure_function_of_name_and_seed(config):
    torch.manual_seed(0)
    first = initialised(config, seed=3)
    torch.manual_seed(99)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LanguageModel(config).named_parameters()}
    for name in reversed(list(shapes)):
        value = initialise_parameter(config, name, shapes[name], 3)
        assert value.dtype == torch.float32 and value.device.type == "cpu"
        assert torch.equal(value, first[name]), name
    assert torch.equal(first["embedding.weight"], initialised(config, seed=3)["embedding.weight"])
    assert not torch.equal(first["embedding.weight"], initialised(config, seed=4)["embedding.weight"])


def test_parameters_of_one_shape_differ():
    values = initialised(SEVEN_B)
    assert not torch.equal(values["blocks.0.mixer.q_proj.weight"], values["blocks.0.mixer.k_proj.weight"])
    assert not torch.equal(values["blocks.0.mixer.q_proj.weight"], values["blocks.1.mixer.q_proj.weight"])


def test_initialise_keeps_the_dtype_of_the_model():
    model = LanguageModel(SEVEN_B).bfloat16()
    initialise(model, seed=0)
    weight = model.blocks[0].mixer.q_proj.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, initialised(SEVEN_B)["blocks.0.mixer.q_proj.weight"].bfloat16())


def test_the_default_dtype_does_not_change_the_values():
    torch.set_default_dtype(torch.float64)
    try:
        value = initialise_parameter(SEVEN_B, "embedding.weight", (512, D_MODEL), 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(value, initialised(SEVEN_B)["embedding.weight"])


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="'blocks.0.mixer.mystery' is no parameter of an xlstm-pretrain model"):
        initialise_parameter(SEVEN_B, "blocks.0.mixer.mystery", (2,), 0)
