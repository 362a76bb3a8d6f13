"""Small models of every family. Axes: B batch, S sequence, V vocabulary."""

import pytest
import torch

from model.config import (
    AttentionConfig,
    MLSTMConfig,
    ModelConfig,
    PreUpMLSTMConfig,
    SLSTMConfig,
    validate_model,
)
from model.initialisation import initialise
from model.language_model import LanguageModel

MLSTM = MLSTMConfig(n_heads=2, reference_chunk_size=8)
SEVEN_B = {"d_model": 32, "vocab_size": 61, "n_blocks": 2, "ffn_dim": 48}
NEURIPS = {"family": "neurips", "d_model": 32, "vocab_size": 61, "norm_eps": 1e-5, "logit_soft_cap": None}
PREUP = PreUpMLSTMConfig(n_heads=2, reference_chunk_size=8)
CAPPED_SLSTM = SLSTMConfig(n_heads=2, gate_soft_cap=15.0)
CONFIGS = {
    "mlstm": ModelConfig(**SEVEN_B, mlstm=MLSTM),
    "mlstm_sigmoid": ModelConfig(**SEVEN_B, mlstm=MLSTMConfig(n_heads=2, reference_chunk_size=8, gate="sigmoid")),
    "mlstm_sigmoid_unnormalised": ModelConfig(
        **SEVEN_B, mlstm=MLSTMConfig(n_heads=2, reference_chunk_size=8, gate="sigmoid", normaliser=False)
    ),
    "slstm": ModelConfig(**SEVEN_B, block="slstm", slstm=CAPPED_SLSTM),
    "mlstm_and_slstm": ModelConfig(**SEVEN_B, slstm_at=[1], mlstm=MLSTM, slstm=CAPPED_SLSTM),
    "attention": ModelConfig(**SEVEN_B, block="attention", attention=AttentionConfig(n_heads=4, n_kv_heads=2)),
    "attention_window": ModelConfig(
        **SEVEN_B, block="attention", attention=AttentionConfig(n_heads=4, n_kv_heads=2, window=5, sinks=True)
    ),
    "attention_nope": ModelConfig(
        **SEVEN_B, attention_at=[1], mlstm=MLSTM, attention=AttentionConfig(n_heads=4, n_kv_heads=4, positions="none")
    ),
    "hybrid": ModelConfig(
        **{**SEVEN_B, "n_blocks": 3, "tie_embeddings": True},
        slstm_at=[1],
        attention_at=[2],
        mlstm=MLSTM,
        slstm=CAPPED_SLSTM,
        attention=AttentionConfig(n_heads=4, n_kv_heads=4),
    ),
    "mlstm_attention": ModelConfig(
        **SEVEN_B,
        block="mlstm_attention",
        layers={
            "mlstm_attention": {
                "mlstm": {"n_heads": 2, "reference_chunk_size": 8},
                "attention": {"n_heads": 4, "n_kv_heads": 2, "window": 5},
            }
        },
    ),
    "neurips_mlstm": ModelConfig(**NEURIPS, n_blocks=2, ffn_dim=None, preup_mlstm=PREUP),
    "neurips_mlstm_and_slstm": ModelConfig(
        **NEURIPS, n_blocks=3, slstm_at=[1], ffn_dim=64, preup_mlstm=PREUP, slstm=SLSTMConfig(n_heads=2)
    ),
}


@pytest.fixture(params=sorted(CONFIGS))
def config(request) -> ModelConfig:
    """One small configuration of each family in turn."""
    return CONFIGS[request.param]


@pytest.fixture
def small_configs() -> dict[str, ModelConfig]:
    """All of them by name."""
    return CONFIGS


def model_in_play(config: ModelConfig, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A model whose every parameter is in play: the initial values, where gate weights are zero, plus noise."""
    assert validate_model(config) == []
    model = LanguageModel(config)
    initialise(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("igate.bias"):
                # Near zero the exponential input gate brings both branches of the normaliser's max into play.
                parameter.fill_(-0.5)
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


@pytest.fixture
def make_model():
    """`model_in_play`."""
    return model_in_play


@pytest.fixture
def make_batch():
    """Tokens and targets [B, S], and document starts at places that no chunk or convolution boundary shares."""

    def make(length: int = 29, vocab_size: int = 61) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(vocab_size, (2, length + 1), generator=generator)
        document_start = torch.zeros(2, length, dtype=torch.bool)
        document_start[:, 0] = True
        for row, position in ((0, 11), (0, 13), (0, 14), (1, 19)):
            if position < length:
                document_start[row, position] = True
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "document_start": document_start}

    return make
