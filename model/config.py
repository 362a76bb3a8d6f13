"""What a model is, as data: block kinds, widths, gates. No tensor is made here.

Shapes that follow from a configuration (head dims, widths) are properties, so that no other file recomputes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

FAMILIES = ("xlstm_7b", "neurips")
BLOCK_KINDS = ("mlstm", "slstm", "attention")
GATES = ("exp", "sigmoid")
BACKENDS = ("auto", "reference")


@dataclass(frozen=True)
class MLSTMConfig:
    """The mLSTM layer of the 7B block (arXiv 2503.13427 §3)."""

    n_heads: int = 8
    # Total query/key and value widths as a share of d_model (7B: 2048 and 4096).
    qk_dim_factor: float = 0.5
    v_dim_factor: float = 1.0
    # Input gate: "exp" (the 7B) or "sigmoid" (mLSTMsig, arXiv 2503.14376).
    gate: str = "exp"
    # Divide the read-out by max(|n q|, 1). Only gate=sigmoid may switch it off.
    normaliser: bool = True
    # a * tanh(x / a) on the gate pre-activations, after the bias; null: none.
    gate_soft_cap: float | None = 15.0
    igate_bias_init: float = -10.0
    # Epsilon of the per-head LayerNorm; functionally part of the gating (a change of it changes the model).
    head_norm_eps: float = 1e-6
    # Added to the read-out's denominator after the max.
    cell_eps: float = 1e-6
    # Tokens per chunk of the chunkwise form; a speed setting, the result does not depend on it.
    chunk_size: int = 64
    backend: str = "auto"


@dataclass(frozen=True)
class PreUpMLSTMConfig:
    """The mLSTM layer of the NeurIPS block, "pre up-projection" (arXiv 2405.04517, figure 11)."""

    n_heads: int = 4
    projection_factor: float = 2.0
    conv_kernel_size: int = 4
    # q, k and v projections are block diagonal with blocks of this width.
    qkv_block_size: int = 4
    head_norm_eps: float = 1e-5
    cell_eps: float = 1e-6
    chunk_size: int = 64
    backend: str = "auto"


@dataclass(frozen=True)
class SLSTMConfig:
    """The sLSTM layer (arXiv 2405.04517, figure 10)."""

    n_heads: int = 4
    conv_kernel_size: int = 4
    head_norm_eps: float = 1e-5
    # null in the NeurIPS blocks; the 7B kind caps at 15 as its mLSTM does.
    gate_soft_cap: float | None = None
    backend: str = "auto"


@dataclass(frozen=True)
class AttentionConfig:
    """Causal multi-head attention with rotary positions, as in Llama."""

    n_heads: int = 32
    n_kv_heads: int = 32
    rope_theta: float = 500000.0


@dataclass(frozen=True)
class ModelConfig:
    """A stack of `n_blocks` residual blocks between an embedding and a language-model head."""

    # "xlstm_7b": RMSNorm, mixer, RMSNorm, SwiGLU. "neurips": LayerNorm, mLSTM pre-up or sLSTM + gated GELU.
    family: str = "xlstm_7b"
    # Rows of the embedding and of the head (a multiple of 64 keeps matmuls aligned).
    vocab_size: int = 50304
    d_model: int = 4096
    n_blocks: int = 32
    # The kind of every block that neither list below names: mlstm | slstm | attention.
    block: str = "mlstm"
    slstm_at: list[int] = field(default_factory=list)
    attention_at: list[int] = field(default_factory=list)
    # Inner width of the feed-forward layers; null where no block has one.
    ffn_dim: int | None = 10944
    norm_eps: float = 1e-6
    logit_soft_cap: float | None = 30.0
    tie_embeddings: bool = False
    # One section for each layer kind that the block list uses; the others stay null.
    mlstm: MLSTMConfig | None = None
    preup_mlstm: PreUpMLSTMConfig | None = None
    slstm: SLSTMConfig | None = None
    attention: AttentionConfig | None = None

    def block_kinds(self) -> list[str]:
        """The kind of each block, first to last."""
        kinds = [self.block] * self.n_blocks
        for position in self.slstm_at:
            kinds[position] = "slstm"
        for position in self.attention_at:
            kinds[position] = "attention"
        return kinds

    @property
    def mlstm_qk_dim(self) -> int:
        """Total query width of the 7B mLSTM layer, all heads together."""
        return round(self.d_model * self.mlstm.qk_dim_factor)

    @property
    def mlstm_v_dim(self) -> int:
        """Total value width of the 7B mLSTM layer, all heads together."""
        return round(self.d_model * self.mlstm.v_dim_factor)

    @property
    def preup_dim(self) -> int:
        """Inner width of the pre-up-projection mLSTM block: rounded up to a multiple of 64."""
        return math.ceil(self.d_model * self.preup_mlstm.projection_factor / 64) * 64
