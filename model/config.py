"""What a model is, as data: block kinds, widths, gates. No tensor is made here.

Shapes that follow from a configuration (head dims, widths) are properties, so that no other file recomputes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kernels.backend_choice import BACKENDS
from kernels.mlstm.gates import GATES

FAMILIES = ("xlstm_7b", "neurips")
BLOCK_KINDS = ("mlstm", "slstm", "attention")


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


@dataclass(frozen=True)
class ModelOnlyConfig:
    """What conf/model_only.yaml composes: for the command lines that need a model and nothing else."""

    model: ModelConfig


def validate_model(config: ModelConfig, prefix: str = "model") -> list[str]:
    """Every problem of `config`, one line each with the key, its value and what to change; empty when there is none."""
    problems: list[str] = []

    def problem(key: str, text: str) -> None:
        problems.append(f"{prefix}.{key}: {text}")

    _check_choice(problem, "family", config.family, FAMILIES)
    _check_choice(problem, "block", config.block, BLOCK_KINDS)
    for key in ("vocab_size", "d_model", "n_blocks"):
        _check_positive(problem, key, getattr(config, key))
    _check_positive(problem, "norm_eps", config.norm_eps)
    _check_soft_cap(problem, "logit_soft_cap", config.logit_soft_cap)
    _check_positions(problem, config)
    if problems:
        # What follows derives from these values.
        return problems
    kinds = set(config.block_kinds())
    if config.family == "neurips" and "attention" in kinds:
        key = "block" if config.block == "attention" else "attention_at"
        problem(key, "attention blocks need the feed-forward layer of the 7B kind; set family=xlstm_7b or remove them")
    _check_ffn_dim(problem, config, kinds)
    _check_sections(problem, config, kinds)
    return problems


def _check_positions(problem, config: ModelConfig) -> None:
    for key in ("slstm_at", "attention_at"):
        positions = getattr(config, key)
        outside = [position for position in positions if not 0 <= position < config.n_blocks]
        if outside:
            problem(key, f"{outside} name no block; positions run from 0 to n_blocks - 1 = {config.n_blocks - 1}")
        repeated = sorted({position for position in positions if positions.count(position) > 1})
        if repeated:
            problem(key, f"{repeated} appear more than once; name each position once")
    shared = sorted(set(config.slstm_at) & set(config.attention_at))
    if shared:
        problem("attention_at", f"{shared} are also in slstm_at; a block has one kind, remove them from one list")


def _check_ffn_dim(problem, config: ModelConfig, kinds: set[str]) -> None:
    needed = config.family == "xlstm_7b" or "slstm" in kinds
    if needed and config.ffn_dim is None:
        problem("ffn_dim", "is null, but these blocks have a feed-forward layer; set its width")
    elif not needed and config.ffn_dim is not None:
        problem("ffn_dim", f"is {config.ffn_dim}, but no block has a feed-forward layer; set it to null")
    elif needed:
        _check_positive(problem, "ffn_dim", config.ffn_dim)


def _check_sections(problem, config: ModelConfig, kinds: set[str]) -> None:
    mlstm_section = "mlstm" if config.family == "xlstm_7b" else "preup_mlstm"
    needed = {mlstm_section if kind == "mlstm" else kind for kind in kinds}
    checks = {
        "mlstm": _check_mlstm,
        "preup_mlstm": _check_preup_mlstm,
        "slstm": _check_slstm,
        "attention": _check_attention,
    }
    for key, check in checks.items():
        section = getattr(config, key)
        if key in needed and section is None:
            problem(key, f"is null, but family={config.family} with these blocks uses it; give the section")
        elif key not in needed and section is not None:
            problem(key, f"is set, but no block of this model (family={config.family}) uses it; set it to null")
        elif section is not None:
            check(lambda name, text, key=key: problem(f"{key}.{name}", text), config)


def _check_mlstm(problem, config: ModelConfig) -> None:
    mlstm = config.mlstm
    _check_choice(problem, "gate", mlstm.gate, GATES)
    if not mlstm.normaliser and mlstm.gate != "sigmoid":
        problem("normaliser", f"is false with gate={mlstm.gate}; only gate=sigmoid works without it, set it to true")
    _check_soft_cap(problem, "gate_soft_cap", mlstm.gate_soft_cap)
    _check_cell(problem, mlstm)
    if mlstm.n_heads < 1:
        problem("n_heads", f"is {mlstm.n_heads}; it must be a positive number")
    for key, width in (("qk_dim_factor", config.mlstm_qk_dim), ("v_dim_factor", config.mlstm_v_dim)):
        factor = getattr(mlstm, key)
        if not width > 0:
            problem(key, f"{factor} gives a width of {width}; choose a positive factor")
        elif mlstm.n_heads > 0:
            _check_heads(problem, mlstm.n_heads, width, f"d_model {config.d_model} x {key} {factor}")


def _check_preup_mlstm(problem, config: ModelConfig) -> None:
    preup = config.preup_mlstm
    _check_cell(problem, preup)
    _check_conv(problem, preup.conv_kernel_size)
    width = config.preup_dim
    if not width > 0:
        problem("projection_factor", f"{preup.projection_factor} gives a width of {width}; choose a positive factor")
        return
    origin = f"d_model {config.d_model} x projection_factor {preup.projection_factor}, rounded up to a multiple of 64"
    _check_heads(problem, preup.n_heads, width, origin)
    if preup.qkv_block_size < 1 or width % preup.qkv_block_size:
        problem("qkv_block_size", f"blocks of {preup.qkv_block_size} do not divide the width {width}; choose a divisor")


def _check_slstm(problem, config: ModelConfig) -> None:
    slstm = config.slstm
    _check_choice(problem, "backend", slstm.backend, BACKENDS)
    _check_positive(problem, "head_norm_eps", slstm.head_norm_eps)
    _check_soft_cap(problem, "gate_soft_cap", slstm.gate_soft_cap)
    _check_conv(problem, slstm.conv_kernel_size)
    _check_heads(problem, slstm.n_heads, config.d_model, "d_model")


def _check_attention(problem, config: ModelConfig) -> None:
    attention = config.attention
    _check_positive(problem, "rope_theta", attention.rope_theta)
    if _check_heads(problem, attention.n_heads, config.d_model, "d_model"):
        head_dim = config.d_model // attention.n_heads
        if head_dim % 2:
            problem(
                "n_heads",
                f"{attention.n_heads} heads of d_model {config.d_model} are {head_dim} wide, and rotary positions "
                "need an even head width; choose another number of heads",
            )
        if attention.n_kv_heads < 1 or attention.n_heads % attention.n_kv_heads:
            problem("n_kv_heads", f"{attention.n_kv_heads} do not divide n_heads {attention.n_heads}; choose a divisor")


def _check_cell(problem, section: MLSTMConfig | PreUpMLSTMConfig) -> None:
    _check_choice(problem, "backend", section.backend, BACKENDS)
    for key in ("head_norm_eps", "cell_eps", "chunk_size"):
        _check_positive(problem, key, getattr(section, key))


def _check_heads(problem, n_heads: int, width: int, origin: str) -> bool:
    if n_heads < 1 or width % n_heads:
        problem("n_heads", f"{n_heads} heads do not divide the width {width} ({origin}); choose a divisor of {width}")
        return False
    return True


def _check_conv(problem, kernel_size: int) -> None:
    if kernel_size < 2:
        problem("conv_kernel_size", f"is {kernel_size}; a convolution over time needs at least 2 taps")


def _check_choice(problem, key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        problem(key, f"unknown value '{value}'; choose one of {', '.join(choices)}")


def _check_positive(problem, key: str, value: float) -> None:
    if not 0 < value < math.inf:
        problem(key, f"is {value}; it must be a positive number")


def _check_soft_cap(problem, key: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        problem(key, f"is {value}; a soft cap must be positive, use null for none")
