"""A head that is tied to the embedding, where the two are on different stages.

The first stage trains the weight. The last one has a copy for its head, which no optimizer has: it sends the copy's
gradient to the first stage before each step, and gets the weight back after it. So the copies are equal bit for bit
after any number of steps, and moments exist once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.stages import Stage
from train.parallel.mesh import Mesh


class TiedWeight:
    """The tied weight as this rank's stage sees it. `copy` is the parameter on the last stage; None on all others."""

    def __init__(self, mesh: Mesh, stage: Stage):
        self._mesh = mesh
        part = stage.part
        is_tied = stage.config.tie_embeddings and part.embedding != part.head
        self._weight: nn.Parameter | None = stage.embedding.weight if is_tied else None
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

    def add_gradients(self, gradient_of: Callable[[nn.Parameter], Tensor]) -> None:
        """Add the copy's gradient to that of the weight, before the ranks of a stage sum theirs.

        `gradient_of`: the fp32 tensor in which the engine sums the gradients of a parameter over micro-batches.
        Collective among first and last stage.
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
        own = gradient_of(self._weight)
        assert own.dtype == torch.float32, "gradients add up in fp32"
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
