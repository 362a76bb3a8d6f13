"""Sizes, rules and numbers of a sweep: what a ladder makes of a model, and what follows from its size."""

from __future__ import annotations

import math

import pytest

from launch.sweep.config import RuleConfig, ShapeConfig, SizeConfig
from launch.sweep.settings import replaced
from launch.sweep.sizes import Measures, measures_of, rule_value, scaled, scaled_positions, settings_of_size, short
from model import preset
from model.accounting import count_parameters
from model.config import validate_model

PRESETS = (
    "xlstm_160m",
    "llama_160m",
    "neurips_125m_7_1",
    "neurips_350m_1_0",
    "tiny",
    "xlstm_7b_mixed",
    "hybrid_160m",
    "parallel_160m",
    "gated_deltanet_160m",
    "mamba2_160m",
)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("parameters", [5e7, 4e8])
def test_every_kind_of_model_comes_near_to_a_number_of_parameters(name, parameters):
    model = preset(name)
    shape = ShapeConfig(head_width=64)
    found = replaced(model, settings_of_size(model, SizeConfig(parameters=parameters), shape))
    assert validate_model(found) == []
    assert count_parameters(found).total == pytest.approx(parameters, rel=0.15)
    assert 0.4 < found.d_model / found.n_blocks / shape.aspect < 2.5
    # The same kinds of blocks.
    assert set(found.block_kinds()) == set(model.block_kinds())


def test_the_ladder_of_the_publication_follows_from_its_widths():
    """arXiv 2510.02228: the presets are what the rule makes of one of them, but for heads, which have another width."""
    model = preset("xlstm_160m")
    for name in ("xlstm_400m", "llama_400m"):
        wanted = preset(name)
        own = model if wanted.mlstm else preset("llama_160m")
        heads = (wanted.mlstm or wanted.attention).n_heads
        shape = ShapeConfig(head_width=wanted.d_model // heads, feed_forward=2.667)
        assert replaced(own, scaled(own, wanted.d_model, wanted.n_blocks, shape)) == wanted


def test_a_size_that_no_model_has_is_refused():
    model = preset("xlstm_160m")
    with pytest.raises(ValueError, match="the model nearest to 100,000 parameters has"):
        settings_of_size(model, SizeConfig(parameters=1e5), ShapeConfig())


@pytest.mark.parametrize(
    ("positions", "blocks", "wanted", "found"),
    [
        ([1], 4, 4, [1]),
        ([3, 20], 24, 24, [3, 20]),
        ([3, 20], 24, 12, [6]),
        ([3, 20], 24, 48, [3, 15, 32, 44]),
        ([2], 4, 2, [1]),
        ([0, 1, 2, 3], 4, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_positions_keep_their_share_of_the_depth(positions, blocks, wanted, found):
    assert scaled_positions(positions, blocks, wanted) == found


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (RuleConfig(value=3e-3), 3e-3),
        # OLMo's ladder: half of 0.0047 at 108e6 parameters without embeddings, and its batch.
        (RuleConfig(value=0.00235, by="non_embedding", at=108e6, exponent=-1 / 3), 0.00235 / 2),
        (RuleConfig(value=327_680, by="non_embedding", at=108e6, exponent=2 / 3), 4 * 327_680),
        # DeepSeek LLM: 0.3118 C^-0.125.
        (RuleConfig(value=0.3118, by="flops", exponent=-0.125), 0.3118 * 1e20**-0.125),
        (RuleConfig(value=1.0, by="d_model", at=1024, exponent=-1, least=0.8), 0.8),
        (RuleConfig(value=1.0, by="d_model", at=1024, exponent=1, most=1.5), 1.5),
    ],
)
def test_rules(rule, value):
    assert rule_value(rule, Measures(1e9, 864e6, 2048, 1e20)) == pytest.approx(value)


def test_measures_and_names():
    measures = measures_of(preset("xlstm_160m"))
    assert measures.parameters == 164_110_224
    assert measures.non_embedding == 164_110_224 - 2 * 50304 * 768 and math.isnan(measures.flops)
    assert [short(number) for number in (999, 46_340, 164_110_224, 6_865_424_896)] == ["999", "46.3k", "164m", "6.87b"]
