"""A head that is tied to the embedding, where the two are on different stages.

The first stage trains the weight. The last one has a copy for its head, which no optimizer has: it sends the copy's
gradient to the first stage before each step, and gets the weight back after it. So the copies are equal bit for bit
after any number of steps, and moments exist once.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from model.stages import Stage
from train.parallel.mesh import Mesh


class TiedWeight:
    """The tied weight as this rank's stage sees it. `copy` is the parameter on the last stage; None on all others."""

    def __init__(self, mesh: Mesh, stage: Stage):
        self._mesh = mesh
        part = stage.part
        is_tied = stage.config.tie_embeddings and part.embedding != part.head
        # DeepSpeed adds attributes of its own to it.
        self._weight: Any = stage.embedding.weight if is_tied else None
        self.copy: nn.Parameter | None = self._weight if part.head else None
        # [V, D] in fp32, summed over micro-batches as the gradients of all other parameters.
        self._gradient: Tensor | None = None
        if self.copy is not None:
            self.copy.register_post_accumulate_grad_hook(self._accumulate)

    @torch.no_grad()
    def _accumulate(self, weight: Tensor) -> None:
        assert weight.grad is not None
        if self._gradient is None:
            self._gradient = torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        self._gradient += weight.grad
        weight.grad = None

    def add_gradients(self, optimizer: Any) -> None:
        """Add the copy's gradient to that of the weight, before the ranks of a stage sum theirs.

        `optimizer`: the DeepSpeed engine's, which may keep gradients of its own. Collective among first and last stage.
        """
        if self._weight is None:
            return
        if self.copy is not None:
            assert self._gradient is not None, "the head has had a backward pass"
            self._mesh.start_transfers({0: self._gradient}, {}, group="pipeline")()
            self._gradient.zero_()
            return
        received = torch.empty_like(self._weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        self._mesh.start_transfers({}, {self._last: received}, group="pipeline")()
        own = self._weight._hp_grad if isinstance(optimizer, BF16_Optimizer) else self._weight.grad
        assert own is not None and own.dtype == torch.float32, "gradients add up in fp32"
        own += received.view_as(own)

    @torch.no_grad()
    def send_weight(self) -> None:
        """Set the copy to the weight. Collective among first and last stage."""
        if self._weight is None:
            return
        if self.copy is not None:
            self._mesh.start_transfers({}, {0: self.copy.data}, group="pipeline")()
        else:
            self._mesh.start_transfers({self._last: self._weight.data}, {}, group="pipeline")()

    @property
    def _last(self) -> int:
        return self._mesh.size_of("pipeline") - 1
