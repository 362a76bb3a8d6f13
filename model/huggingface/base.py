"""What every architecture of transformers that we write and read must answer, and the error.

One file for each: `xlstm`, `llama`, and `plugin_format`, which is ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from model.config import ModelConfig

CONFIG = "config.json"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open safetensors file, not read yet. `name`: its name there."""

    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of the first axis."""
        rows: torch.Tensor = self.file.get_slice(self.name)[start:end]
        return rows


# Name of a tensor of theirs -> the tensor.
Tensors = dict[str, StoredTensor]


class HuggingFaceError(ValueError):
    """An export or import that cannot be done; the message holds every reason."""

    def __init__(self, what: str, reasons: list[str]):
        self.reasons = reasons
        super().__init__(f"{what}:\n" + "\n".join(f"  - {reason}" for reason in reasons))


class OtherLogitsError(HuggingFaceError):
    """What was exported does not compute the same in transformers."""


class Format(ABC):
    """One architecture of transformers, in both directions."""

    # For messages, and `model_type` of its config.json.
    name: str
    model_type: str
    # Whether the head may be tied to the embedding.
    ties_head: bool
    # Name -> text of further files that are written beside config.json.
    files: ClassVar[dict[str, str]] = {}

    @abstractmethod
    def is_for(self, config: ModelConfig) -> bool:
        """Whether a model of `config` is to be written in this format."""

    @abstractmethod
    def inexpressible(self, config: ModelConfig) -> list[str]:
        """Every reason why the format cannot hold `config`; empty when it can."""

    @abstractmethod
    def config_json(self, config: ModelConfig, dtype: torch.dtype, sequence_length: int | None) -> dict[str, Any]:
        """config.json of a model for which `inexpressible` found no reason, without the ids of special tokens."""

    @abstractmethod
    def unreadable(self, values: dict[str, Any]) -> list[str]:
        """Every reason why a model with this config.json cannot be read; empty when it can."""

    @abstractmethod
    def model_config(self, directory: Path, values: dict[str, Any], tensors: Tensors) -> ModelConfig:
        """Our configuration from config.json and shapes of tensors. Raises HuggingFaceError where one is missing."""

    @abstractmethod
    def tensor_layout(self, names: Iterable[str], values: dict[str, Any]) -> dict[str, list[str]]:
        """Their tensor -> the parameters of ours (`names`, in the model's order) whose rows it holds, first to last.

        `values`: config.json.
        """

    def usual_names(self, tensors: Tensors) -> Tensors:
        """The tensors of a file under the names that `tensor_layout` gives."""
        return tensors


def layout_of_blocks(names: Iterable[str], prefix: str, block: dict[str, str], outer: dict[str, str]) -> dict[str, str]:
    """Our parameter -> their tensor, where blocks are numbered below `prefix`."""
    layout = {}
    for name in names:
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            layout[name] = f"{prefix}.{index}.{block[rest]}"
        else:
            layout[name] = outer[name]
    return layout


def tensor_shape(directory: Path, tensors: Tensors, name: str, what: str) -> tuple[int, ...]:
    """The shape of the tensor `name`; raises HuggingFaceError where `directory` has none, and so is no `what`."""
    if name not in tensors:
        raise HuggingFaceError(f"{directory} does not hold {what}", [f"tensor {name} is missing"])
    return tensors[name].shape
