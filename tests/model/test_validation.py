import dataclasses

import pytest

from model.config import AttentionConfig, MLSTMConfig, ModelConfig, PreUpMLSTMConfig, SLSTMConfig, validate_model

SEVEN_B = ModelConfig(mlstm=MLSTMConfig())
MIXED = ModelConfig(slstm_at=[3], mlstm=MLSTMConfig(), slstm=SLSTMConfig())
LLAMA = ModelConfig(block="attention", attention=AttentionConfig())
NEURIPS = ModelConfig(family="neurips", d_model=768, n_blocks=24, ffn_dim=None, preup_mlstm=PreUpMLSTMConfig())


def changed(config: ModelConfig, **values) -> ModelConfig:
    """`config` with values set; a dotted key is written section__key."""
    for key, value in values.items():
        section, _, leaf = key.rpartition("__")
        if section:
            value = dataclasses.replace(getattr(config, section), **{leaf: value})
        config = dataclasses.replace(config, **{section or leaf: value})
    return config


CASES = [
    (SEVEN_B, {"family": "llama"}, "model.family: unknown value 'llama'; choose one of xlstm_7b, neurips"),
    (SEVEN_B, {"block": "mamba"}, "model.block: unknown value 'mamba'; choose one of mlstm, slstm, attention"),
    (SEVEN_B, {"vocab_size": 0}, "model.vocab_size: is 0; it must be a positive number"),
    (SEVEN_B, {"n_blocks": -1}, "model.n_blocks: is -1; it must be a positive number"),
    (SEVEN_B, {"norm_eps": float("nan")}, "model.norm_eps: is nan; it must be a positive number"),
    (SEVEN_B, {"logit_soft_cap": 0.0}, "model.logit_soft_cap: is 0.0; a soft cap must be positive, use null for none"),
    (SEVEN_B, {"ffn_dim": None}, "model.ffn_dim: is null, but these blocks have a feed-forward layer; set its width"),
    (SEVEN_B, {"ffn_dim": -8}, "model.ffn_dim: is -8; it must be a positive number"),
    (NEURIPS, {"ffn_dim": 1024}, "model.ffn_dim: is 1024, but no block has a feed-forward layer; set it to null"),
    (
        MIXED,
        {"slstm_at": [3, 32, -1]},
        "model.slstm_at: [32, -1] name no block; positions run from 0 to n_blocks - 1 = 31",
    ),
    (MIXED, {"slstm_at": [3, 3]}, "model.slstm_at: [3] appear more than once; name each position once"),
    (
        MIXED,
        {"attention_at": [3]},
        "model.attention_at: [3] are also in slstm_at; a block has one kind, remove them from one list",
    ),
    (
        NEURIPS,
        {"attention_at": [1], "attention": AttentionConfig(n_heads=4, n_kv_heads=4)},
        "model.attention_at: attention blocks need the feed-forward layer of the 7B kind; "
        "set family=xlstm_7b or remove them",
    ),
    (
        SEVEN_B,
        {"mlstm": None},
        "model.mlstm: is null, but family=xlstm_7b with these blocks uses it; give the section",
    ),
    (
        SEVEN_B,
        {"slstm": SLSTMConfig()},
        "model.slstm: is set, but no block of this model (family=xlstm_7b) uses it; set it to null",
    ),
    (
        NEURIPS,
        {"mlstm": MLSTMConfig()},
        "model.mlstm: is set, but no block of this model (family=neurips) uses it; set it to null",
    ),
    (
        SEVEN_B,
        {"mlstm__qk_dim_factor": 0.503},
        "model.mlstm.n_heads: 8 heads do not divide the width 2060 (d_model 4096 x qk_dim_factor 0.503); "
        "choose a divisor of 2060",
    ),
    (
        SEVEN_B,
        {"mlstm__v_dim_factor": 0.503},
        "model.mlstm.n_heads: 8 heads do not divide the width 2060 (d_model 4096 x v_dim_factor 0.503); "
        "choose a divisor of 2060",
    ),
    (
        SEVEN_B,
        {"mlstm__v_dim_factor": 0.0},
        "model.mlstm.v_dim_factor: 0.0 gives a width of 0; choose a positive factor",
    ),
    (SEVEN_B, {"mlstm__n_heads": 0}, "model.mlstm.n_heads: is 0; it must be a positive number"),
    (SEVEN_B, {"mlstm__gate": "relu"}, "model.mlstm.gate: unknown value 'relu'; choose one of exp, sigmoid"),
    (
        SEVEN_B,
        {"mlstm__normaliser": False},
        "model.mlstm.normaliser: is false with gate=exp; only gate=sigmoid works without it, set it to true",
    ),
    (
        SEVEN_B,
        {"mlstm__gate_soft_cap": -15.0},
        "model.mlstm.gate_soft_cap: is -15.0; a soft cap must be positive, use null for none",
    ),
    (
        SEVEN_B,
        {"mlstm__reference_chunk_size": 0},
        "model.mlstm.reference_chunk_size: is 0; it must be a positive number",
    ),
    (SEVEN_B, {"mlstm__head_norm_eps": 0.0}, "model.mlstm.head_norm_eps: is 0.0; it must be a positive number"),
    (
        SEVEN_B,
        {"mlstm__backend": "cuda"},
        "model.mlstm.backend: unknown value 'cuda'; choose one of auto, reference",
    ),
    (
        NEURIPS,
        {"preup_mlstm__n_heads": 5},
        "model.preup_mlstm.n_heads: 5 heads do not divide the width 1536 "
        "(d_model 768 x projection_factor 2.0, rounded up to a multiple of 64); choose a divisor of 1536",
    ),
    (
        NEURIPS,
        {"preup_mlstm__qkv_block_size": 5},
        "model.preup_mlstm.qkv_block_size: blocks of 5 do not divide the width 1536; choose a divisor",
    ),
    (
        NEURIPS,
        {"preup_mlstm__conv_kernel_size": 1},
        "model.preup_mlstm.conv_kernel_size: is 1; a convolution over time needs at least 2 taps",
    ),
    (
        NEURIPS,
        {"preup_mlstm__projection_factor": -2.0},
        "model.preup_mlstm.projection_factor: -2.0 gives a width of -1536; choose a positive factor",
    ),
    (
        MIXED,
        {"slstm__n_heads": 3},
        "model.slstm.n_heads: 3 heads do not divide the width 4096 (d_model); choose a divisor of 4096",
    ),
    (MIXED, {"slstm__conv_kernel_size": 0}, "model.slstm.conv_kernel_size: is 0; a convolution over time needs"),
    (
        LLAMA,
        {"attention__n_heads": 4096},
        "model.attention.n_heads: 4096 heads of d_model 4096 are 1 wide, and rotary positions need an even head width; "
        "choose another number of heads",
    ),
    (
        LLAMA,
        {"attention__n_heads": 33},
        "model.attention.n_heads: 33 heads do not divide the width 4096 (d_model); choose a divisor of 4096",
    ),
    (
        LLAMA,
        {"attention__n_kv_heads": 5},
        "model.attention.n_kv_heads: 5 do not divide n_heads 32; choose a divisor",
    ),
    (
        LLAMA,
        {"attention__positions": "alibi"},
        "model.attention.positions: unknown value 'alibi'; choose one of rotary, none",
    ),
    (LLAMA, {"attention__window": 0}, "model.attention.window: is 0; it must be a positive number"),
    (LLAMA, {"attention__window": 2**31}, "model.attention.window: is 2147483648; it must be at most 2147483647"),
    (LLAMA, {"attention__rope_theta": 0.0}, "model.attention.rope_theta: is 0.0; it must be a positive number"),
]


@pytest.mark.parametrize(("config", "change", "expected"), CASES, ids=[case[2][:60] for case in CASES])
def test_one_problem_is_named_with_its_key_value_and_remedy(config, change, expected):
    assert validate_model(config) == []
    problems = validate_model(changed(config, **change))
    assert len(problems) == 1 and problems[0].startswith(expected), problems


def test_all_problems_come_at_once_under_the_given_prefix():
    config = changed(
        MIXED, ffn_dim=None, mlstm__n_heads=7, mlstm__normaliser=False, slstm__n_heads=3, mlstm__cell_eps=0
    )
    problems = validate_model(config, prefix="experiment.model")
    assert [problem.split(":")[0] for problem in problems] == [
        "experiment.model.ffn_dim",
        "experiment.model.mlstm.normaliser",
        "experiment.model.mlstm.cell_eps",
        "experiment.model.mlstm.n_heads",
        "experiment.model.mlstm.n_heads",
        "experiment.model.slstm.n_heads",
    ]


def test_without_rotary_positions_heads_may_be_of_any_width():
    assert validate_model(changed(LLAMA, attention__n_heads=4096, attention__positions="none")) == []


def test_a_block_kind_that_positions_replace_everywhere_needs_no_section():
    config = ModelConfig(n_blocks=2, slstm_at=[0, 1], slstm=SLSTMConfig())
    assert validate_model(config) == []
