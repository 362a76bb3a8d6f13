"""The whole language model."""

from __future__ import annotations

from model.config import ModelConfig
from model.parts import Part
from model.stages import ModelOutput, Stage

__all__ = ["LanguageModel", "ModelOutput"]


class LanguageModel(Stage):
    """A stack of `config.n_blocks` residual blocks between an embedding and a head: the stage that holds all.

    Example:
        config = preset("tiny")
        model = LanguageModel(config)
        initialise(model, seed=0)
        logits = model(torch.tensor([[1, 2, 3]])).logits
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config, Part.whole(config))
