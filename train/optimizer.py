"""AdamW as the published xLSTM recipes use it: which parameters decay, and no step on a gradient that is not finite.

Recipes: arXiv 2503.13427 (xLSTM 7B) and arXiv 2405.04517 (NeurIPS blocks; epsilon 1e-5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay."""

    # The peak of the schedule.
    learning_rate: float = 4e-4
    # Decay of the first and of the second moment, per step.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
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
    groups = {
        "decayed": {"name": "decayed", "params": [], "weight_decay": config.weight_decay},
        "not_decayed": {"name": "not_decayed", "params": [], "weight_decay": 0.0},
    }
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            groups["decayed" if is_decayed(name) else "not_decayed"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


class FiniteAdamW(torch.optim.AdamW):
    """torch's AdamW whose `step` does nothing, on every rank alike, when a gradient on any rank is NaN or infinite.

    A skipped step leaves parameters, moments and step counts as they were. `last_step_skipped` tells what the latest
    call did, `skipped_steps` counts the skipped calls of this process. The check costs one read of the gradients, one
    all-reduce of a single number (none without torch.distributed) and one wait of the host for the device.

    DeepSpeed calls `step` on its flat fp32 partitions: once for ZeRO-0 and BF16_Optimizer, once for each parameter
    group for ZeRO-1 and 2 and each sub-group for ZeRO-3. Those three look at the norm of all gradients before the first
    call and skip by themselves (then `engine.skipped_steps` counts), so a step is never applied by halves.
    """

    def __init__(self, params: Any, *, process_group: dist.ProcessGroup | None = None, **settings: Any):
        """`settings` are those of torch.optim.AdamW; `process_group` (None: all ranks) is who must agree on a step."""
        super().__init__(params, **settings)
        self.process_group = process_group
        self.last_step_skipped = False
        self.skipped_steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One AdamW step, or nothing. Raises ValueError for a closure: it would change gradients after the check."""
        if closure is not None:
            raise ValueError("FiniteAdamW.step takes no closure; compute the gradients before the call")
        self.last_step_skipped = not self._gradients_are_finite()
        if self.last_step_skipped:
            self.skipped_steps += 1
            return None
        return super().step()

    def _gradients_are_finite(self) -> bool:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # The largest magnitude is finite exactly when all entries are: no overflow as in a sum, no temporary copy.
        largest = [
            torch.linalg.vector_norm(gradient, ord=math.inf, dtype=torch.float32)
            for gradient in gradients
            if gradient.numel()
        ]
        device = parameters[0].device if parameters else torch.device("cpu")
        unusable = torch.zeros((), dtype=torch.float32, device=device)
        if largest:
            unusable = (~torch.stack(largest).isfinite().all()).to(torch.float32)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(unusable, op=dist.ReduceOp.MAX, group=self.process_group)
        return not bool(unusable.item())


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    process_group: dist.ProcessGroup | None = None,
) -> FiniteAdamW:
    """FiniteAdamW over `parameter_groups`, with torch's fused kernel where the parameters are on a CUDA device."""
    groups = parameter_groups(named_parameters, config)
    on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return FiniteAdamW(
        groups,
        lr=config.learning_rate,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=on_cuda,
        process_group=process_group,
    )
