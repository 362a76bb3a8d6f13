"""The formats that we know, the special ones first."""

from __future__ import annotations

from model.config import ModelConfig
from model.huggingface.base import Format
from model.huggingface.llama import LlamaFormat
from model.huggingface.plugin_format import PLUGIN
from model.huggingface.xlstm import XLSTMFormat

FORMATS: tuple[Format, ...] = (LlamaFormat(), PLUGIN, XLSTMFormat())
# Of an export: an architecture of transformers, or ours.
FORMAT_NAMES = ("transformers", "plugin")


def format_named(name: str, config: ModelConfig) -> Format:
    """The format, one of FORMAT_NAMES, in which a model of `config` is written. Raises ValueError for another name."""
    if name not in FORMAT_NAMES:
        raise ValueError(f"format: unknown value '{name}'; choose {' or '.join(FORMAT_NAMES)}")
    return PLUGIN if name == "plugin" else format_for(config)


def format_for(config: ModelConfig) -> Format:
    """The architecture of transformers in which a model of `config` is written, if it can be written at all."""
    return next(known for known in FORMATS if known.is_for(config))


def inexpressible(config: ModelConfig) -> list[str]:
    """Every reason why `config` has no counterpart in the format that comes nearest; empty when it has one."""
    return format_for(config).inexpressible(config)
