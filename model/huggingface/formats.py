"""The formats that we know, the special ones first."""

from __future__ import annotations

from model.config import ModelConfig
from model.huggingface.base import Format
from model.huggingface.llama import LlamaFormat
from model.huggingface.xlstm import XLSTMFormat

FORMATS: tuple[Format, ...] = (LlamaFormat(), XLSTMFormat())


def format_for(config: ModelConfig) -> Format:
    """The format in which a model of `config` is written, if it can be written at all."""
    return next(known for known in FORMATS if known.is_for(config))


def inexpressible(config: ModelConfig) -> list[str]:
    """Every reason why `config` has no counterpart in the format that comes nearest; empty when it has one."""
    return format_for(config).inexpressible(config)
