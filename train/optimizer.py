"""AdamW as the published xLSTM recipes use it: which parameters decay, and a step that can be skipped.

Recipes: arXiv 2503.13427 (xLSTM 7B) and arXiv 2405.04517 (NeurIPS blocks; epsilon 1e-5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay."""

    # The peak of the schedule.
    learning_rate: float = 4e-4
    # Decay of the first and of the second moment, per step.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    # Added to the root of the second moment before it divides.
    eps: float = 1e-8
    # Per step, times the learning rate; on dense weights only (see `is_decayed`).
    weight_decay: float = 0.1
    # Upper limit of the gradient's global L2 norm; null: no clipping.
    gradient_clipping: float | None = 0.5


def validate_optimizer(config: OptimizerConfig, prefix: str = "optimizer") -> list[str]:
    """Every problem of `config`, one line each, with its key path."""
    problems = []
    if not (math.isfinite(config.learning_rate) and config.learning_rate > 0):
        problems.append(f"{prefix}.learning_rate: must be above 0 ({config.learning_rate}); 4e-4 suits the 7B")
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        problems.append(
            f"{prefix}.betas: two numbers in 0..1, without 1, are expected ({config.betas}); try [0.9, 0.95]"
        )
    if not (math.isfinite(config.eps) and config.eps > 0):
        problems.append(f"{prefix}.eps: must be above 0 ({config.eps}); try 1e-8")
    if not (math.isfinite(config.weight_decay) and config.weight_decay >= 0):
        problems.append(f"{prefix}.weight_decay: must not be negative ({config.weight_decay}); 0 switches it off")
    clipping = config.gradient_clipping
    if clipping is not None and not (math.isfinite(clipping) and clipping > 0):
        problems.append(f"{prefix}.gradient_clipping: must be above 0 ({clipping}); write null for no clipping")
    return problems


def describe_optimizer(config: OptimizerConfig) -> str:
    """The settings as a reader's line."""
    clipping = "not clipped" if config.gradient_clipping is None else f"clipped at {config.gradient_clipping:g}"
    return (
        f"AdamW, peak learning rate {config.learning_rate:g}, betas {config.betas[0]:g} and {config.betas[1]:g}, "
        f"eps {config.eps:g}, weight decay {config.weight_decay:g}, gradient norm {clipping}"
    )


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter `name`.

    Dense weights decay, those of the gates and of the head included; the embedding, norms, biases, the learnable skip
    and the sLSTM's recurrent kernel do not.
    """
    *path, last = name.split(".")
    return "weight" in last and "norm" not in name and "embedding" not in path


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """The optimizer's groups "decayed" and "not_decayed", each in the order of the parameters.

    Parameters that take no gradient are left out, and so is a group without any parameter.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (decayed if is_decayed(name) else not_decayed).append(parameter)
    groups = [
        {"name": "decayed", "params": decayed, "weight_decay": config.weight_decay},
        {"name": "not_decayed", "params": not_decayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class SkippableAdamW(torch.optim.AdamW):
    """torch's AdamW whose `step` does nothing while `skip_step` is set: parameters, moments and step counts stay.

    DeepSpeed calls `step` once for each parameter group or sub-group, so whether a step is applied cannot be decided in
    here: `Engine.step` decides once, for all ranks and groups, from the norm of all gradients.
    """

    skip_step = False

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """torch's step, or nothing."""
        if self.skip_step:
            return None
        loss: float | None = super().step(closure)
        return loss


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
) -> SkippableAdamW:
    """SkippableAdamW over `parameter_groups`, with torch's fused kernel where the parameters are on a CUDA device."""
    groups = parameter_groups(named_parameters, config)
    first_decay, second_decay = config.betas
    on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return SkippableAdamW(
        groups,
        lr=config.learning_rate,
        betas=(first_decay, second_decay),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=on_cuda,
    )
