"""A model with its weights, from whatever a user has of it."""

from __future__ import annotations

from pathlib import Path

import torch

from model.config import ModelConfig
from model.huggingface import import_huggingface
from model.language_model import LanguageModel
from model.locate import is_huggingface, locate
from model.weights import load_into, read_model_json


def load(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The trained model in `path`, in evaluation mode.

    Args:
        path: a run's directory (its newest complete checkpoint), a checkpoint (step-XXXXXXXX), a weights directory
            (model.json and weights-*.safetensors), or a Hugging Face xLSTM or Llama directory.
        device: where its parameters lie.
        dtype: of its parameters. Gates, norms, states and logits compute in float32 at least.

    Raises:
        WeightsError: `path` is none of these, or its weights are damaged or incomplete.
        HuggingFaceError: it is a Hugging Face directory of another model.

    Example:
        model = load("runs/first")
        logits = model(torch.tensor([[1, 2, 3]])).logits
    """
    path = Path(path)
    if not is_huggingface(path):
        weights = locate(path).weights
        model = empty_model(read_model_json(weights), torch.device(device), dtype)
        load_into(model, weights)
        return model.eval()
    config, state_dict = import_huggingface(path)
    model = empty_model(config, torch.device(device), dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state_dict[name])
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
