"""One view on weights, gradients and optimizer moments, whatever the engine.

An engine keeps the fp32 weights and the moments whole or cut over ranks. A `Fragment` says which part of which
parameter a rank holds, and where. Checkpoints, initialisation, gradient norms, clipping and the finite check all work
on fragments, so none of them knows an engine, and a checkpoint written under one layout loads under any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class ReadRange(Protocol):
    """Where weights come from: a checkpoint, or the seed."""

    def __call__(self, name: str, offset: int, numel: int) -> Tensor:
        """Elements [offset, offset + numel) of the flattened parameter `name`: 1-D, on the host."""


@dataclass
class Fragment:
    """The contiguous part [offset, offset + numel) of one flattened parameter, as held by this rank."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int
    # False where another rank holds the same values and is the one that counts and saves them.
    owned: bool
    # The parameter as the forward pass reads it: flat, this fragment's part, in the compute dtype.
    compute: Tensor
    # AdamW, the flat fp32 tensor that it updates, and where this fragment begins in it.
    optimizer: torch.optim.Optimizer
    optimizer_parameter: Tensor
    start: int
    # The reduced (averaged) gradient of this fragment; valid after the last backward of a step, before the optimizer.
    read_gradient: Callable[[], Tensor | None]

    @property
    def master(self) -> Tensor:
        """View [numel] on the fp32 weights."""
        return self.optimizer_parameter.detach().view(-1).narrow(0, self.start, self.numel)

    def gradient(self) -> Tensor | None:
        """Flat gradient [numel], or None when no gradient reached the parameter."""
        gradient = self.read_gradient()
        return None if gradient is None else gradient.detach().reshape(-1)

    def moment(self, key: str) -> Tensor:
        """View [numel] on the optimizer's moment `key`, one of MOMENTS; `prepare_moments` must have run."""
        moment: Tensor = self.optimizer.state[self.optimizer_parameter][key]
        return moment.view(-1).narrow(0, self.start, self.numel)


def prepare_moments(fragments: Iterable[Fragment], completed_steps: int) -> None:
    """Create AdamW's state tensors (zero moments, `completed_steps` applied) where the first step would create them."""
    held = {id(fragment.optimizer_parameter): fragment for fragment in fragments}
    for fragment in held.values():
        optimizer, parameter = fragment.optimizer, fragment.optimizer_parameter
        # torch's AdamW keeps its step count beside the parameter when fused, else on the host.
        device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
        optimizer.state[parameter] = {
            "step": torch.tensor(float(completed_steps), device=device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


def squared_gradient_norm(fragments: Iterable[Fragment], device: torch.device) -> Tensor:
    """Squared L2 norm of the gradients that this rank owns, fp32 scalar; NaN or inf if any element is."""
    gradients = [g.float() for f in fragments if f.owned and (g := f.gradient()) is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float32, device=device)
    return torch.stack(list(torch._foreach_norm(gradients))).square().sum()


def clip_gradients(fragments: Iterable[Fragment], gradient_norm: float, limit: float | None) -> bool:
    """Scale the gradients, whose global norm is `gradient_norm`, down to `limit` (None: leave them).

    Returns whether the gradients are finite; others are left as they are, and no step is to be taken with them.
    """
    finite = math.isfinite(gradient_norm)
    if finite and limit is not None and gradient_norm > limit:
        gradients = [g for f in fragments if (g := f.gradient()) is not None]
        torch._foreach_mul_(gradients, limit / (gradient_norm + 1e-6))
    return finite
