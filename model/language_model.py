"""The whole language model."""

from model.stages import LanguageModel, ModelOutput

__all__ = ["LanguageModel", "ModelOutput"]
