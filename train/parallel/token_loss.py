"""The loss that every engine differentiates: a sum over tokens, so that each valid token counts once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data_pipeline.reading.batch import Batch
from model.language_model import LanguageModel


class TokenLossSum(nn.Module):
    """The model as an engine sees it: tokens in, summed token losses out."""

    def __init__(self, model: LanguageModel, z_loss_weight: float):
        super().__init__()
        self.model = model
        self.z_loss_weight = z_loss_weight

    def forward(self, tokens: Tensor, targets: Tensor, document_start: Tensor) -> Tensor:
        """[B, S] int64, int64 (-100: not scored), bool -> fp32 scalar, the sum over the valid targets.

        The z-loss is part of it in training mode only: what is evaluated is the cross-entropy.
        """
        loss_sum: Tensor = self.model(
            tokens,
            targets=targets,
            document_start=document_start,
            loss_reduction="sum",
            z_loss_weight=self.z_loss_weight if self.training else 0.0,
        ).loss_sum
        return loss_sum


def model_name(name: str) -> str:
    """The model's own name of a parameter of `TokenLossSum`."""
    return name.removeprefix("model.")


def on_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What `TokenLossSum` takes of a batch."""
    tokens, targets, document_start = (
        tensor.to(device, non_blocking=True) for tensor in (batch.tokens, batch.targets, batch.document_start)
    )
    return tokens, targets, document_start
