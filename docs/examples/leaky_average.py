"""A leaky average of the inputs over time: the layer that docs/adding_a_layer.md writes.

Axes: B batch, S sequence, D model width, W width of the average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.hardware import Hardware
from model.initial_values import constant, reads_stream, writes_stream
from model.layers import LayerKind, Parameter, StateElements, register
from model.problems import Problem, check_positive
from model.projections import Linear
from model.sequence import LOCAL, SequenceContext


@dataclass(frozen=True)
class LeakyAverageConfig:
    # W.
    width: int = 64
    # First value of the decays, before the sigmoid.
    decay_init: float = 2.0


@dataclass
class LeakyAverageState:
    # [B, W], float32 at least.
    average: Tensor


class LeakyAverage(nn.Module):
    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.decay = nn.Parameter(torch.empty(width))
        self.in_proj = Linear(d_model, width)
        self.out_proj = Linear(width, d_model)

    def forward(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: LeakyAverageState | None,
        return_state: bool,
        sequence: SequenceContext = LOCAL,
    ) -> tuple[Tensor, LeakyAverageState | None]:
        values = self.in_proj(x)
        # At least float32: a sum over thousands of tokens does not fit in bfloat16.
        dtype = torch.promote_types(values.dtype, torch.float32)
        values, decay = values.to(dtype), torch.sigmoid(self.decay.to(dtype))
        average = torch.zeros_like(values[:, 0]) if state is None else state.average
        averages = []
        for t in range(x.shape[1]):
            if document_start is not None:
                average = average.masked_fill(document_start[:, t, None], 0)
            average = decay * average + (1 - decay) * values[:, t]
            averages.append(average)
        y = self.out_proj(torch.stack(averages, dim=1).to(x.dtype))
        return y, LeakyAverageState(average) if return_state else None


class LeakyAverageKind(LayerKind):
    name = "leaky_average"
    block = "leaky_average"
    families = ("xlstm_7b",)
    settings_class = LeakyAverageConfig
    # It goes token by token, which torch.compile would write out.
    loops_on_cpu = True
    speed_settings = ()

    def validate(self, config: ModelConfig, problem: Problem) -> None:
        check_positive(problem, "width", self.settings(config).width)

    def module(self, config: ModelConfig, statistics_name: str) -> LeakyAverage:
        return LeakyAverage(config.d_model, self.settings(config).width)

    def parameters(self, config: ModelConfig, block_index: int) -> dict[str, Parameter]:
        settings, d_model = self.settings(config), config.d_model
        return {
            "decay": Parameter((settings.width,), "decays", constant(settings.decay_init)),
            "in_proj.weight": Parameter((settings.width, d_model), "averages", reads_stream(config), "projections"),
            "out_proj.weight": Parameter((d_model, settings.width), "averages", writes_stream(config), "projections"),
        }

    def forward_flops(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> dict[str, float]:
        return {"leaky average": sequence_length * self.decoding_flops(config, 0)}

    def decoding_flops(self, config: ModelConfig, context: int) -> float:
        return 4.0 * self.settings(config).width

    def activation_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        width, c = self.settings(config).width, hardware.compute_bytes
        # The input and its norm, the averages for the output; in float32 the values and each average.
        return c * (2 * config.d_model + width) + 8 * width

    def state_elements(self, config: ModelConfig) -> StateElements:
        return StateElements(recurrent=self.settings(config).width)


register(LeakyAverageKind())
