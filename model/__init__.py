"""The language models: configuration, modules, initialisation, accounting, weights on disk, generation.

For programs and notebooks:

    import torch
    from model import LanguageModel, generate, load, preset

    model = load("runs/first")                          # a run, a checkpoint, weights, a Hugging Face directory
    fresh = LanguageModel(preset("tiny", n_blocks=2))   # without values: model.initialisation.initialise(fresh, seed=0)
    logits = model(torch.tensor([[1, 2, 3]])).logits
    tokens = generate(model, [[1, 2, 3]], max_new_tokens=10)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from model.kernels_package import use_own_kernels

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.generation import generate
    from model.language_model import LanguageModel
    from model.loading import load
    from model.presets import preset

__all__ = ["LanguageModel", "ModelConfig", "generate", "load", "preset"]

use_own_kernels()

# Found when they are first asked for: a command line that needs no PyTorch does not wait for it.
_HOMES = {
    "LanguageModel": "model.language_model",
    "ModelConfig": "model.config",
    "generate": "model.generation",
    "load": "model.loading",
    "preset": "model.presets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
