"""A model with its weights, from whatever a user has of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import ModelConfig
from model.huggingface import HuggingFaceReader
from model.language_model import LanguageModel
from model.locate import Located, locate
from model.parameters import parameter_shapes
from model.weights import WeightsError, WeightsReader, read_model_json


@dataclass(frozen=True)
class StoredModel:
    """A model on disk, found whole. Nothing of its weights is read before it is asked for."""

    located: Located
    config: ModelConfig
    # Of every parameter, by its name.
    shapes: Mapping[str, tuple[int, ...]]
    reader: WeightsReader | HuggingFaceReader

    def read_range(self, name: str, offset: int, numel: int) -> torch.Tensor:
        """Elements [offset, offset + numel) of the flattened parameter `name`, on the CPU, in the dtype on disk."""
        return self.reader.read_range(name, offset, numel)

    def read(self, name: str) -> torch.Tensor:
        """One whole parameter, on the CPU, in the dtype on disk."""
        shape = self.shapes[name]
        return self.read_range(name, 0, math.prod(shape)).view(shape)


def open_stored(reference: str | Path) -> StoredModel:
    """The model that `reference` names in the grammar of model/locate.py.

    Raises WeightsError or HuggingFaceError: there is none, it is damaged or incomplete, or its weights are not those of
    its own configuration.
    """
    located = locate(reference)
    if located.is_huggingface:
        theirs = HuggingFaceReader(located.weights)
        return StoredModel(located, theirs.config, theirs.shapes, theirs)
    config, reader = read_model_json(located.weights), WeightsReader(located.weights)
    reader.check_coverage()
    expected = parameter_shapes(config)
    if reader.shapes != expected:
        differing = sorted({name for name, _ in set(reader.shapes.items()) ^ set(expected.items())})
        shown = ", ".join(differing[:8]) + (", ..." if len(differing) > 8 else "")
        raise WeightsError(
            f"{located.weights}: the weights are not those of its model.json: {len(differing)} parameters differ or "
            f"are missing ({shown})"
        )
    return StoredModel(located, config, reader.shapes, reader)


def load(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The trained model in `path`, in evaluation mode.

    Args:
        path: a run's directory (its newest complete checkpoint), RUN@STEP, a checkpoint (step-XXXXXXXX), a weights
            directory (model.json and weights-*.safetensors), or a Hugging Face directory of an xLSTM, a Llama or
            a model of ours (`format=plugin`).
        device: where its parameters lie.
        dtype: of its parameters. Gates, norms, states and logits compute in float32 at least.

    Raises:
        WeightsError: `path` is none of these, or its weights are damaged or incomplete.
        HuggingFaceError: it is a Hugging Face directory of another model.

    Example:
        model = load("runs/first@1000")
        logits = model(torch.tensor([[1, 2, 3]])).logits
    """
    stored = open_stored(path)
    model = empty_model(stored.config, torch.device(device), dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored.read(name))
    return model.eval()


def empty_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """The model with parameters on `device` in `dtype` from the start: a 7B in fp32 may not fit first."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LanguageModel(config)
    finally:
        torch.set_default_dtype(default)
