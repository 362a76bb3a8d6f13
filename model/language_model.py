"""The whole language model."""

from __future__ import annotations

from torch import Tensor

from model.config import ModelConfig
from model.parts import Part
from model.stages import ModelOutput, Stage
from model.state import ModelState

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

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        document_start: Tensor | None = None,
        state: ModelState | None = None,
        return_state: bool = False,
        loss_reduction: str = "none",
        z_loss_weight: float = 0.0,
    ) -> ModelOutput:
        """Run the model over a stretch of tokens [B, S]: a training batch, a prompt, or one decoding step.

        Arguments, result and errors as for `Stage.forward`.
        """
        return super().forward(
            tokens,
            targets=targets,
            document_start=document_start,
            state=state,
            return_state=return_state,
            loss_reduction=loss_reduction,
            z_loss_weight=z_loss_weight,
        )
