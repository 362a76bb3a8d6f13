"""A kind of layer from outside of the package, whole: a leaky average of the inputs over time, in one file.

Axes: B batch, S sequence, D model width, W width of the average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.hardware import Hardware
from model.initial_values import constant, reads_stream, writes_stream
from model.layers import LayerKind, Parameter, StateElements, register
from model.problems import Problem, check_positive
from model.projections import Linear
from model.sequence import LOCAL, SequenceContext

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True)
class ToyConfig:
    width: int = 4
    # What an average starts with as its decay, before the sigmoid.
    decay_init: float = 2.0


@dataclass
class ToyState:
    # [B, W]
    average: Tensor


class Toy(nn.Module):
    """y = W_out a with a[t] = d a[t - 1] + (1 - d) W_in x[t], d = sigmoid(decay)."""

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.in_proj = Linear(d_model, width)
        self.decay = nn.Parameter(torch.empty(width))
        self.out_proj = Linear(width, d_model)

    def forward(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: ToyState | None,
        return_state: bool,
        sequence: SequenceContext = LOCAL,
    ) -> tuple[Tensor, ToyState | None]:
        values = self.in_proj(x)
        decay = torch.sigmoid(self.decay)
        average = torch.zeros_like(values[:, 0]) if state is None else state.average
        averages = []
        for t in range(x.shape[1]):
            if document_start is not None:
                average = average.masked_fill(document_start[:, t, None], 0)
            average = decay * average + (1 - decay) * values[:, t]
            averages.append(average)
        y = self.out_proj(torch.stack(averages, dim=1).to(x.dtype))
        return y, ToyState(average) if return_state else None


class ToyKind(LayerKind):
    name = "toy"
    block = "toy"
    families = ("xlstm_7b",)
    settings_class = ToyConfig
    speed_settings = ()

    def validate(self, config: ModelConfig, problem: Problem) -> None:
        check_positive(problem, "width", self.settings(config).width)

    def module(self, config: ModelConfig, statistics_name: str) -> Toy:
        return Toy(config.d_model, self.settings(config).width)

    def parameters(self, config: ModelConfig, block_index: int) -> dict[str, Parameter]:
        settings, d_model = self.settings(config), config.d_model
        return {
            "decay": Parameter((settings.width,), "decays", constant(settings.decay_init)),
            "in_proj.weight": Parameter((settings.width, d_model), "averages", reads_stream(config), "projections"),
            "out_proj.weight": Parameter((d_model, settings.width), "averages", writes_stream(config), "projections"),
        }

    def forward_flops(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> dict[str, float]:
        return {"toy": 4.0 * sequence_length * self.settings(config).width}

    def decoding_flops(self, config: ModelConfig, context: int) -> float:
        return 4.0 * self.settings(config).width

    def activation_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        return hardware.compute_bytes * (2 * config.d_model + 4 * self.settings(config).width)

    def state_elements(self, config: ModelConfig) -> StateElements:
        return StateElements(recurrent=self.settings(config).width)

    def huggingface_reasons(self, config: ModelConfig, positions: list[int]) -> list[str]:
        return [f"toy blocks at {positions}: nobody but this test has them"]


register(ToyKind())
