"""Small models of every block kind, with random weights everywhere so that every tensor matters."""

import dataclasses

import torch

from model.config import AttentionConfig, MLSTMConfig, ModelConfig, PreUpMLSTMConfig, SLSTMConfig
from model.language_model import LanguageModel

MLSTM = MLSTMConfig(n_heads=4, reference_chunk_size=16)
CONFIGS = {
    "mlstm": ModelConfig(vocab_size=96, d_model=128, n_blocks=3, ffn_dim=192, mlstm=MLSTM),
    "sigmoid": ModelConfig(
        vocab_size=96,
        d_model=128,
        n_blocks=2,
        ffn_dim=192,
        mlstm=MLSTMConfig(n_heads=4, reference_chunk_size=16, gate="sigmoid", normaliser=False),
    ),
    "hybrid": ModelConfig(
        vocab_size=96,
        d_model=128,
        n_blocks=4,
        ffn_dim=192,
        slstm_at=[1],
        attention_at=[2],
        mlstm=MLSTM,
        slstm=SLSTMConfig(n_heads=4, gate_soft_cap=15.0),
        attention=AttentionConfig(n_heads=4, n_kv_heads=2),
    ),
    "attention": ModelConfig(
        vocab_size=96,
        d_model=128,
        n_blocks=2,
        block="attention",
        ffn_dim=192,
        logit_soft_cap=None,
        tie_embeddings=True,
        attention=AttentionConfig(n_heads=4, n_kv_heads=4),
    ),
    "window": ModelConfig(
        vocab_size=96,
        d_model=128,
        n_blocks=2,
        block="attention",
        ffn_dim=192,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2, window=16, sinks=True),
    ),
    "mlstm_attention": ModelConfig(
        vocab_size=96,
        d_model=128,
        n_blocks=2,
        block="mlstm_attention",
        ffn_dim=192,
        layers={
            "mlstm_attention": {
                "mlstm": {"n_heads": 4, "reference_chunk_size": 16},
                "attention": {"n_heads": 4, "n_kv_heads": 2, "window": 16},
            }
        },
    ),
    "neurips": ModelConfig(
        family="neurips",
        vocab_size=96,
        d_model=128,
        n_blocks=3,
        slstm_at=[1],
        ffn_dim=192,
        norm_eps=1e-5,
        logit_soft_cap=None,
        preup_mlstm=PreUpMLSTMConfig(n_heads=4, reference_chunk_size=16),
        slstm=SLSTMConfig(n_heads=4),
    ),
}
# With the ids of a small tokenizer.
TEXT_CONFIG = dataclasses.replace(CONFIGS["mlstm"], vocab_size=384)


def random_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A model whose every parameter is random: initialisation leaves gates at zero and norms at one."""
    model = LanguageModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "learnable_skip" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(noise)
                if name.endswith("igate.bias"):
                    # Negative as in a trained model: else n q, of either sign, may come near 0 in the denominator, and
                    # two float32 computations of the same formula differ by more than any tolerance.
                    parameter -= 5
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model
