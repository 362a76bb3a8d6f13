"""The loss that every engine differentiates: a sum over tokens, so that each valid token counts once."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from data_pipeline.reading.batch import Batch
from model.stages import Stage
from model.state import ModelState


class TokenLossSum(nn.Module):
    """The model as an engine sees it: tokens in, summed token losses out."""

    def __init__(self, model: Stage, z_loss_weight: float):
        super().__init__()
        self.model = model
        self.z_loss_weight = z_loss_weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None,
        document_start: Tensor,
        state: ModelState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor | None, ModelState | None]:
        """The loss of a stretch of tokens, and the state behind it.

        Args:
            tokens: [B, S] int64.
            targets: [B, S] int64, -100: not scored. None: there is no loss, and the head computes nothing.
            document_start: [B, S] bool.
            state: behind the tokens before these; None: they begin their sequences.
            return_state: also return the state behind the last token.

        Returns:
            fp32 scalar, the sum over the valid targets; the state. What was not asked for is None. The z-loss is part
            of the sum in training mode only: what is evaluated is the cross-entropy.
        """
        if targets is None:
            return None, self.model.advance(tokens, document_start=document_start, state=state)
        output = self.model(
            tokens,
            targets=targets,
            document_start=document_start,
            state=state,
            return_state=return_state,
            loss_reduction="sum",
            z_loss_weight=self.z_loss_weight if self.training else 0.0,
        )
        return output.loss_sum, output.state


def model_name(name: str) -> str:
    """The model's own name of a parameter of a module that holds the model, or a stage, as `model`."""
    return re.sub(r"^(\d+\.)?model\.", "", name)


def on_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What `TokenLossSum` takes of a batch."""
    tokens, targets, document_start = (
        tensor.to(device, non_blocking=True) for tensor in (batch.tokens, batch.targets, batch.document_start)
    )
    return tokens, targets, document_start
