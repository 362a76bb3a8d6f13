"""What a model is, as data: kinds of blocks, widths, and a section of settings for each kind of layer.

No tensor is made here. What a kind's settings may be, and what follows from them, is in its file of model/layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conf.settings import build_settings, settings_problems
from model import layers
from model.layers.attention import AttentionConfig
from model.layers.mlstm import MLSTMConfig
from model.layers.preup_mlstm import PreUpMLSTMConfig
from model.layers.slstm import SLSTMConfig
from model.problems import (
    LARGEST_WIDTH,
    MOST_BLOCKS,
    Problem,
    check_choice,
    check_positive,
    check_size,
    check_soft_cap,
)

__all__ = [
    "AttentionConfig",
    "FAMILIES",
    "MLSTMConfig",
    "ModelConfig",
    "ModelOnlyConfig",
    "PreUpMLSTMConfig",
    "SLSTMConfig",
    "validate_model",
]

FAMILIES = ("xlstm_7b", "neurips")


@dataclass(frozen=True)
class ModelConfig:
    """A stack of `n_blocks` residual blocks between an embedding and a language-model head."""

    # "xlstm_7b": RMSNorm, mixer, RMSNorm, SwiGLU. "neurips": LayerNorm, mLSTM pre-up or sLSTM + gated GELU.
    family: str = "xlstm_7b"
    # Rows of the embedding and of the head (a multiple of 64 keeps matmuls aligned).
    vocab_size: int = 50304
    # Width of the residual stream.
    d_model: int = 4096
    # Number of blocks.
    n_blocks: int = 32
    # The kind of every block that no list below names: mlstm | slstm | attention, or one of a plugin.
    block: str = "mlstm"
    # Positions of sLSTM blocks, from 0.
    slstm_at: list[int] = field(default_factory=list)
    # Positions of attention blocks, from 0.
    attention_at: list[int] = field(default_factory=list)
    # Positions of blocks of a plugin's kind, by its name.
    other_at: dict[str, list[int]] = field(default_factory=dict)
    # Inner width of the feed-forward layers; null where no block has one.
    ffn_dim: int | None = 10944
    # Epsilon of the norms in front of the layers and of the last one.
    norm_eps: float = 1e-6
    # a * tanh(x / a) on the logits; null: none.
    logit_soft_cap: float | None = 30.0
    # The head has the weights of the embedding.
    tie_embeddings: bool = False
    # One section for each layer kind that the block list uses; the others stay null.
    mlstm: MLSTMConfig | None = None
    preup_mlstm: PreUpMLSTMConfig | None = None
    slstm: SLSTMConfig | None = None
    attention: AttentionConfig | None = None
    # Settings of a plugin's kinds, by their names; a kind that is not named has its defaults.
    layers: dict[str, Any] = field(default_factory=dict)
    # Modules that register further kinds of layers, such as my_package.my_layer (model/layers/base.py).
    plugins: list[str] = field(default_factory=list)

    def block_kinds(self) -> list[str]:
        """What the configuration calls the kind of each block, first to last."""
        kinds = [self.block] * self.n_blocks
        for kind, positions in self.positions().items():
            for position in positions:
                kinds[position] = kind
        return kinds

    def positions(self) -> dict[str, list[int]]:
        """Kind -> the blocks that a list names."""
        return {"slstm": self.slstm_at, "attention": self.attention_at, **self.other_at}

    def section(self, name: str, schema: type) -> Any:
        """The settings of the kind `name`, an instance of `schema`, in a valid configuration."""
        section = self.layers.get(name, {}) if name not in _SECTIONS else getattr(self, name)
        return section if name in _SECTIONS else build_settings(schema, section)


# Kinds with a section of their own.
_SECTIONS = tuple(kind.name for kind in layers.built_in_kinds())


@dataclass(frozen=True)
class ModelOnlyConfig:
    """What conf/model_only.yaml composes: for the command lines that need a model and nothing else."""

    model: ModelConfig


def validate_model(config: ModelConfig, prefix: str = "model") -> list[str]:
    """Every problem of `config`, one line each with the key, its value and what to change; empty when there is none.

    Imports the modules of `config.plugins`.
    """
    problems: list[str] = []

    def problem(key: str, text: str) -> None:
        problems.append(f"{prefix}.{key}: {text}")

    for text in layers.import_plugins(config):
        problem("plugins", text)
    check_choice(problem, "family", config.family, FAMILIES)
    _check_kinds(problem, config)
    for key, limit in (("vocab_size", LARGEST_WIDTH), ("d_model", LARGEST_WIDTH), ("n_blocks", MOST_BLOCKS)):
        check_size(problem, key, getattr(config, key), limit)
    check_positive(problem, "norm_eps", config.norm_eps)
    check_soft_cap(problem, "logit_soft_cap", config.logit_soft_cap)
    _check_positions(problem, config)
    if problems:
        # What follows derives from these values.
        return problems
    _check_families(problem, config)
    if problems:
        return problems
    _check_ffn_dim(problem, config)
    _check_sections(problem, config)
    return problems


def _check_kinds(problem: Problem, config: ModelConfig) -> None:
    known = layers.block_names()
    check_choice(problem, "block", config.block, tuple(known))
    for kind in config.other_at:
        if kind in ("slstm", "attention"):
            problem(f"other_at.{kind}", f"these positions have a list of their own; name them in {kind}_at")
        elif kind not in known:
            problem(
                f"other_at.{kind}",
                f"no such kind of layer; known are {', '.join(known)}; name the module that registers it in plugins",
            )


def _check_positions(problem: Problem, config: ModelConfig) -> None:
    taken: dict[int, str] = {}
    for kind, positions in config.positions().items():
        key = _list_of(config, kind)
        outside = [position for position in positions if not 0 <= position < config.n_blocks]
        if outside:
            problem(key, f"{outside} name no block; positions run from 0 to n_blocks - 1 = {config.n_blocks - 1}")
        repeated = sorted({position for position in positions if positions.count(position) > 1})
        if repeated:
            problem(key, f"{repeated} appear more than once; name each position once")
        for other in dict.fromkeys(taken.values()):
            shared = sorted({position for position in positions if taken.get(position) == other})
            if shared:
                problem(key, f"{shared} are also in {other}; a block has one kind, remove them from one list")
        taken |= dict.fromkeys(positions, key)


def _list_of(config: ModelConfig, kind: str) -> str:
    return f"other_at.{kind}" if kind in config.other_at else f"{kind}_at"


def _check_families(problem: Problem, config: ModelConfig) -> None:
    """Kinds that do not stand in the blocks of this family."""
    for name in dict.fromkeys(config.block_kinds()):
        kinds = [kind for kind in layers.registered_kinds() if kind.block == name]
        families = [family for kind in kinds for family in kind.families]
        if config.family not in families:
            key = "block" if config.block == name else _list_of(config, name)
            problem(key, f"{name} blocks {kinds[0].family_reason}; set family={families[0]} or remove them")


def _check_ffn_dim(problem: Problem, config: ModelConfig) -> None:
    needed = any(kind.has_feed_forward for kind in layers.layer_kinds(config))
    if needed and config.ffn_dim is None:
        problem("ffn_dim", "is null, but these blocks have a feed-forward layer; set its width")
    elif not needed and config.ffn_dim is not None:
        problem("ffn_dim", f"is {config.ffn_dim}, but no block has a feed-forward layer; set it to null")
    elif config.ffn_dim is not None:
        check_size(problem, "ffn_dim", config.ffn_dim, LARGEST_WIDTH)


def _check_sections(problem: Problem, config: ModelConfig) -> None:
    used = {kind.name: kind for kind in layers.layer_kinds(config)}
    for kind in layers.built_in_kinds():
        section = getattr(config, kind.name)
        if kind.name in used and section is None:
            problem(kind.name, f"is null, but family={config.family} with these blocks uses it; give the section")
        elif kind.name not in used and section is not None:
            problem(kind.name, f"is set, but no block of this model (family={config.family}) uses it; set it to null")
        elif section is not None:
            kind.validate(config, _within(problem, kind.name))
    for name in config.layers:
        if name not in used or name in _SECTIONS:
            problem(f"layers.{name}", "is set, but no block of this model is of such a plugin's kind; remove it")
    for name, kind in used.items():
        if name in _SECTIONS:
            continue
        found = settings_problems(kind.settings_class, config.layers.get(name, {}))
        for key, text in found:
            problem(f"layers.{name}{key}", text)
        if not found:
            kind.validate(config, _within(problem, f"layers.{name}"))


def _within(problem: Problem, section: str) -> Problem:
    return lambda key, text: problem(f"{section}.{key}", text)
