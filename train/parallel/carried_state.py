"""What the rows of the batch carry from step to step: training that goes on with its documents (truncated BPTT).

Row l of a step goes on where row l of the step before ended: a row is a lane (data_pipeline.reading.stream.Lanes). The
state behind a window enters the next one without a gradient. Where a lane begins a segment, its row begins empty.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.state import ModelState, map_tensors, named_tensors

# Name of a tensor of the state, lanes -> its rows for these lanes, on the host.
ReadLanes = Callable[[str, range], Tensor]


class CarriedState:
    """The states of the lanes of one rank.

    Args:
        lanes: those of this rank, in the order of its micro-batches.
        micro_batch_size: lanes of one micro-batch.
        form: number of rows -> a state of so many, whatever it holds, as the model returns it. Collective.
    """

    def __init__(self, lanes: range, micro_batch_size: int, form: Callable[[int], ModelState]):
        assert len(lanes) % micro_batch_size == 0, (lanes, micro_batch_size)
        self.lanes = lanes
        self._micro_batch_size = micro_batch_size
        self._form = form
        # Of each micro-batch; None: empty.
        self._states: list[ModelState | None] = [None] * (len(lanes) // micro_batch_size)

    def entering(self, micro_batch: int, continues: Tensor | None) -> ModelState | None:
        """The state that enters micro-batch number `micro_batch` of a step; None: nothing.

        continues: [B] bool, on the host: rows that go on where they ended; None: none does.
        """
        state = self._states[micro_batch]
        if state is None or continues is None or not continues.any():
            return None
        return state if continues.all() else _of_rows(state, continues)

    def leave(self, micro_batch: int, state: ModelState) -> None:
        """Keep the state behind micro-batch number `micro_batch`, without a graph."""
        # A view would keep what it is a view of.
        self._states[micro_batch] = state.map(lambda tensor: tensor.detach().clone())

    def drop_non_finite(self) -> None:
        """Empty the rows that are not finite, as a step may leave them whose gradient is not."""
        for number, state in enumerate(self._states):
            if state is not None:
                finite = [tensor.reshape(len(tensor), -1).isfinite().all(1) for _, tensor in named_tensors(state)]
                self._states[number] = _of_rows(state, torch.stack(finite).all(0))

    def clear(self) -> None:
        """Empty all rows."""
        self._states = [None] * len(self._states)

    def tensors(self) -> dict[str, Tensor]:
        """All rows in the order of `lanes`: name -> [lanes, ...]; {} where all are empty."""
        found: dict[str, list[Tensor]] = {}
        for state in self._states:
            for name, tensor in named_tensors(state):
                found.setdefault(name, []).append(tensor)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def fill(self, read: ReadLanes | None) -> None:
        """Take all rows from `read`; None: empty them. Collective."""
        self.clear()
        if read is None:
            return
        size = self._micro_batch_size
        form = self._form(size)
        for number in range(len(self._states)):
            lanes = self.lanes[number * size : (number + 1) * size]
            self._states[number] = _filled(form, lanes, read)


def _filled(form: ModelState, lanes: range, read: ReadLanes) -> ModelState:
    rows = iter([read(name, lanes).to(tensor) for name, tensor in named_tensors(form)])
    return map_tensors(form, lambda _: next(rows))


def _of_rows(state: ModelState, kept: Tensor) -> ModelState:
    """`state` with zeros, the empty state, in the rows that are not `kept` [B]."""

    def choose(tensor: Tensor) -> Tensor:
        rows = kept.to(tensor.device).view(-1, *(1 for _ in tensor.shape[1:]))
        return torch.where(rows, tensor, tensor.new_zeros(()))

    return state.map(choose)
