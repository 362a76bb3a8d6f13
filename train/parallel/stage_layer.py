"""A stage of the model as DeepSpeed's pipeline engine sees it: a layer that computes one unit after another.

A unit is a time chunk of a micro-batch, or all of it where nothing is cut. The state behind a chunk enters the next
one on the same stage; it never leaves the stage, and neither does its gradient. The engine differentiates the output
of each unit and nothing else, so the state behind a chunk is tied to its output: by the time the chunk goes backward
the next one has done so, and the gradient of the state that entered that one is there.

Axes: B batch, S tokens of a unit, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.reading.batch import Batch
from model import statistics
from model.stages import Stage
from model.state import ModelState
from model.statistics import Statistics
from train.parallel.time_chunks import as_leaves, with_gradients
from train.parallel.token_loss import on_device


@dataclass(frozen=True)
class Unit:
    """What a stage needs of a unit beside the tokens or hidden states.

    Attributes:
        targets: [B, S] int64, -100: not scored.
        document_start: [B, S] bool.
        loss_scale: scalar that the sum of losses is multiplied by.
        is_first, is_last: of the chunks of its micro-batch.
    """

    targets: Tensor
    document_start: Tensor
    loss_scale: Tensor
    is_first: bool = True
    is_last: bool = True


def units_of(
    batches: Sequence[Batch], chunks: Sequence[slice], loss_scale: Tensor, device: torch.device
) -> Iterator[Unit]:
    """The units of micro-batches that are cut into `chunks`, in the order of their forward passes."""
    for batch in batches:
        _, targets, document_start = on_device(batch, device)
        for chunk in chunks:
            yield Unit(targets[:, chunk], document_start[:, chunk], loss_scale, chunk is chunks[0], chunk is chunks[-1])


class StageLayer(nn.Module):
    """One stage of the model as an engine sees it: tokens or hidden states in, hidden states or summed losses out.

    `units` gives one for each forward pass, in turn. The backward passes of a micro-batch's units come in the reverse
    order of their forward passes. `compute_context` makes the context of a forward pass.
    """

    def __init__(self, model: Stage, z_loss_weight: float, compute_context: Callable[[], AbstractContextManager[Any]]):
        super().__init__()
        self.model = model
        self.z_loss_weight = z_loss_weight
        self.units: Iterator[Unit] = iter(())
        self._compute_context = compute_context
        # Of the micro-batch whose chunks go forward: what enters the next one, and what the ones before recorded.
        self._entering: ModelState | None = None
        self._recorded: list[tuple[int, Statistics]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, S] int64 tokens or [B, S, D] hidden states of the stage before -> [B, S, D], or fp32 scalar at the end.

        The z-loss is part of it in training mode only.
        """
        unit = next(self.units)
        state, self._entering = self._entering, None
        assert (state is None) == unit.is_first
        with statistics.recording_chunk(is_first=unit.is_first) as measured, self._compute_context():
            output = self.model(
                inputs,
                targets=unit.targets if self.model.part.head else None,
                document_start=unit.document_start,
                state=state,
                return_state=not unit.is_last,
                loss_reduction="sum",
                z_loss_weight=self.z_loss_weight if self.training else 0.0,
            )
        if measured is not None:
            self._recorded.append((inputs.shape[1], measured))
        if unit.is_last:
            statistics.add_chunks(self._recorded)
            self._recorded = []
        result: Tensor = output.hidden if output.loss_sum is None else output.loss_sum * unit.loss_scale
        return result if unit.is_last else self._tied(result, output.state)

    def _tied(self, result: Tensor, behind: ModelState) -> Tensor:
        """`result`, with which the state behind the unit goes backward; that state enters the next unit."""
        self._entering = behind.detach()
        if not torch.is_grad_enabled():
            return result
        leaves = as_leaves(self._entering)
        return with_gradients(result, behind, lambda: [leaf.grad for leaf in leaves])
