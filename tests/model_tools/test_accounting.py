"""Counts from the configuration against published numbers, against the modules, and against what PyTorch counts."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conf import CONF_DIR, compose
from model.accounting import (
    count_parameters,
    decoding_bytes_per_step,
    decoding_flops_per_token,
    forward_flops,
    parameter_shapes,
    six_n_flops_per_token,
    state_elements,
    training_flops_per_token,
)
from model.config import ModelOnlyConfig
from model.language_model import LanguageModel
from model.layers.mlstm_cell import mlstm_cell_flops
from model.projections import BlockDiagonalLinear
from tests.model_tools.small_models import CONFIGS, random_model

PRESETS = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml"))


def preset(name):
    return compose(ModelOnlyConfig, "model_only", [f"model={name}"]).model


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_are_those_of_the_modules_for_every_preset(name):
    config = preset(name)
    with torch.device("meta"):
        model = LanguageModel(config)
    assert list(parameter_shapes(config).items()) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_counts_are_those_of_the_modules(config):
    parameters = dict(LanguageModel(config).named_parameters())
    counted = count_parameters(config)
    assert counted.total == sum(p.numel() for p in parameters.values()) == sum(counted.groups.values())
    assert counted.tensors == len(parameters)


# arXiv 2503.13427 (published counts of the 7B family) and arXiv 2405.04517 (NeurIPS models).
@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("xlstm_160m", 164_110_224),
        ("xlstm_400m", 406_856_896),
        ("xlstm_830m", 841_496_256),
        ("xlstm_1b4", 1_420_839_104),
        ("xlstm_2b7", 2_780_449_600),
        ("xlstm_7b", 6_865_424_896),
        ("neurips_125m_1_0", 163_806_144),
        ("neurips_125m_7_1", 163_690_928),
        ("neurips_350m_1_0", 409_290_112),
        ("neurips_350m_7_1", 408_436_048),
        ("neurips_1b3_1_0", 1_422_367_104),
        ("neurips_1b3_7_1", 1_419_872_592),
    ],
)
def test_published_parameter_counts(name, total):
    assert count_parameters(preset(name)).total == total


def test_groups_of_the_7b():
    counted = count_parameters(preset("xlstm_7b"))
    assert counted.tensors == 483
    assert counted.groups == {
        "embedding": 206_045_184,
        "norms": 397_312,
        "feed-forward": 4_303_355_904,
        "query and key": 536_870_912,
        "value, output gate, output": 1_610_612_736,
        "gates": 2_097_664,
        "head": 206_045_184,
    }


def test_7b_flops_against_the_published_numbers():
    config = preset("xlstm_7b")
    # arXiv 2503.13427, table 3 (8 heads, 8192 tokens, chunks of 64).
    assert mlstm_cell_flops(8, 256, 512, 8192, 64) == pytest.approx(4.13e10, rel=2e-3)
    assert sum(forward_flops(config, 8192).values()) == pytest.approx(1.104e14, rel=1e-3)
    assert training_flops_per_token(config, 8192) == pytest.approx(4.04e10, rel=2e-3)
    assert six_n_flops_per_token(config) == 6 * 6_865_424_896


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_flops_of_matrices_are_those_that_pytorch_counts(config):
    length = 32
    model = random_model(config)
    counter = FlopCounterMode(display=False, depth=10)
    with counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64))
    counted = counter.get_flop_counts()
    maps = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | BlockDiagonalLinear)]
    in_blocks = sum(sum(counted[f"LanguageModel.{name}"].values()) for name in maps)
    flops = forward_flops(config, length)
    gating = 0
    for kind in config.block_kinds():
        if kind == "mlstm" and config.family == "neurips":
            gating += 4 * config.preup_mlstm.width(config.d_model)
        elif kind == "mlstm_attention":
            gating += 2 * config.ffn_dim + config.d_model
        else:
            gating += 2 * config.ffn_dim + (config.mlstm.v_width(config.d_model) if kind == "mlstm" else 0)
    assert flops["projections"] + flops["feed-forward"] == in_blocks + gating * length
    assert flops["head"] == sum(counted["LanguageModel.lm_head"].values())


def test_attention_counts_the_causal_half():
    config, length = CONFIGS["attention"], 64
    # Scores and values of all pairs cost 4 S^2 d per layer; the softmax 5 S^2 per head.
    full = config.n_blocks * length**2 * (4 * config.d_model + 5 * config.attention.n_heads)
    assert forward_flops(config, length)["attention"] == full / 2


def test_decoding_is_the_forward_pass_of_one_token_but_for_the_cell():
    for name in ("mlstm", "neurips", "hybrid"):
        config = CONFIGS[name]
        forward = forward_flops(config, 1)
        other = sum(count for component, count in forward.items() if component not in ("mLSTM cell", "attention"))
        cells = decoding_flops_per_token(config) - other
        mlstm_blocks = config.block_kinds().count("mlstm")
        heads, dk, dv = {"neurips": (4, 64, 64)}.get(name, (4, 16, 32))
        recurrent = mlstm_blocks * heads * (6 * dk * dv + 7 * dk + dv + 12)
        attention = config.block_kinds().count("attention") * (4 * config.d_model + 5 * 4)
        assert cells == pytest.approx(recurrent + attention)


def test_last_chunk_that_is_cut_short_counts_as_it_is():
    whole = mlstm_cell_flops(2, 8, 16, 64, 32)
    assert mlstm_cell_flops(2, 8, 16, 74, 32) == whole + mlstm_cell_flops(2, 8, 16, 10, 10)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_state_is_as_large_as_the_one_that_the_model_carries(config):
    length = 5
    with torch.no_grad():
        state = random_model(config)(torch.zeros(1, length, dtype=torch.int64), return_state=True).state
    numels = []
    state.map(lambda tensor: numels.append(tensor.numel() if tensor.is_floating_point() else 0) or tensor)
    elements = state_elements(config)
    fixed = elements["recurrent"] + elements["convolution"] + elements["window"]
    assert sum(numels) == fixed + length * elements["cache_per_token"]


def test_a_window_bounds_what_attention_computes_and_keeps():
    config, length = CONFIGS["window"], 64
    free = dataclasses.replace(config, attention=dataclasses.replace(config.attention, window=None))
    per_pair = config.n_blocks * (4 * config.d_model + 5 * config.attention.n_heads)
    pairs = sum(min(query + 0.5, 16) for query in range(length))
    assert forward_flops(config, length)["attention"] == pytest.approx(pairs * per_pair, rel=0.01)
    assert forward_flops(config, 16) == forward_flops(free, 16)
    decoded = [decoding_flops_per_token(config, context) for context in (0, 15, 16, 1000)]
    assert decoded[0] < decoded[1] == decoded[2] == decoded[3] == decoding_flops_per_token(free, 15)
    assert decoding_bytes_per_step(config, context=1000) == decoding_bytes_per_step(config)
    assert decoding_bytes_per_step(config) - decoding_bytes_per_step(free) == 2 * config.n_blocks * 15 * 2 * 64
    assert (state_elements(config)["window"], state_elements(free)["window"]) == (config.n_blocks * 15 * 2 * 64, 0)


def test_7b_decoding_moves_weights_once_and_the_state_twice():
    config = preset("xlstm_7b")
    weights = 2 * (6_865_424_896 - 50304 * 4096 + 4096)
    assert decoding_bytes_per_step(config) == weights + 2 * 134_480_896
    batch = decoding_bytes_per_step(config, batch_size=8)
    assert batch - decoding_bytes_per_step(config) == 7 * (2 * 134_480_896 + 2 * 4096)
    llama = preset("llama_7b")
    cache = decoding_bytes_per_step(llama, context=1000) - decoding_bytes_per_step(llama)
    assert cache == 2 * 1000 * 2 * llama.n_blocks * llama.d_model


def test_decoding_moves_the_inputs_of_convolutions_in_the_dtype_of_the_activations():
    config = CONFIGS["neurips"]
    elements = state_elements(config)
    assert elements["convolution"] == 3 * (2 * 256 + 128)
    of_sequence = decoding_bytes_per_step(config, batch_size=2) - decoding_bytes_per_step(config)
    assert of_sequence == 2 * 4 * elements["recurrent"] + 2 * (2 * elements["convolution"] + config.d_model)
    with torch.no_grad():
        tokens = torch.zeros(1, 5, dtype=torch.int64)
        state = random_model(config).bfloat16()(tokens, return_state=True).state
    assert all(block.conv_tail.dtype == torch.bfloat16 for block in state.blocks)
