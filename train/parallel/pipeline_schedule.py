"""The order in which a stage computes its units, time chunks of micro-batches, as instructions for DeepSpeed's engine.

With p stages, m micro-batches and k chunks of each there are m k units. A stage takes their forward passes in the order
of time. Their backward passes come micro-batch after micro-batch, and in each the last chunk first: a chunk waits for
the gradient of the state behind it, which the next chunk gives. Stage i (0 to p - 1) computes

    forward    unit number n                                                  in slot i + 2 n
    backward   number n: of micro-batch n // k, chunk k - 1 - n % k           in slot 2 (p + k - 1) - 1 - i + 2 n

So the last stage begins to go backward when all chunks of the first micro-batch are forward, and then takes a forward
and a backward pass in turn; each stage before it goes forward a slot earlier and backward a slot later. Of two
neighbours one goes forward when the other goes backward; between slots they exchange what both have computed, the
gradient first, so that stages never wait for each other in a circle. Only the order counts: a slot lasts as long as
what a stage has to do.

With t the time of one forward and one backward pass of a unit, a step takes (m k + p - 1) t, of which a stage computes
m k t: it waits for (p - 1) / (m k + p - 1) of a step. Stage i has begun and not ended at most k + p - 1 - i units.

With one chunk this is 1F1B (PipeDream-Flush, arXiv 2006.09503); with more the order is that of Seq1F1B (arXiv
2406.03488), whose chunks are of unequal length since attention takes longer for later ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
)

from train.parallel.balance import units_in_flight


class UnitSchedule(PipeSchedule):
    """Forward and backward passes of one step at stage `stage_id`.

    What follows, the reduction of gradients and the optimizer, waits for the trainer. The ids of buffers say where a
    stage keeps a unit from its forward to its backward pass; there are as many as units in flight.
    """

    def __init__(self, micro_batches: int, chunks: int, stages: int, stage_id: int):
        super().__init__(micro_batches * chunks, stages, stage_id)
        self._chunks = chunks
        self._in_flight = units_in_flight(stages, stage_id, micro_batches, chunks)

    def num_pipe_buffers(self) -> int:
        """See PipeSchedule."""
        return self._in_flight

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """The instructions of each slot."""
        units, has_previous, has_next = self.num_micro_batches, not self.is_first_stage, not self.is_last_stage
        first_backward = 2 * (self.stages + self._chunks - 1) - 1 - self.stage_id
        free = list(range(self._in_flight))
        buffers: dict[int, int] = {}
        # Of the slot before.
        computed: int | None = None
        for slot in range(2 * (units + self._chunks + self.stages - 2)):
            goes_forward = slot % 2 == self.stage_id % 2
            number = (slot - (self.stage_id if goes_forward else first_backward)) // 2
            is_idle = not 0 <= number < units
            instructions: list[PipeInstruction] = []
            buffer: int | None = None
            if goes_forward:
                if has_previous and computed is not None:
                    instructions.append(SendGrad(computed))
                if not is_idle:
                    buffer = buffers[number] = free.pop()
                    instructions += [RecvActivation(buffer)] if has_previous else []
                    instructions += [] if has_previous and has_next else [LoadMicroBatch(buffer)]
                    instructions.append(ForwardPass(buffer))
            else:
                if not is_idle:
                    buffer = buffers.pop(self._backward_unit(number))
                    free.append(buffer)
                    instructions += [RecvGrad(buffer)] if has_next else []
                if has_next and computed is not None:
                    instructions.append(SendActivation(computed))
                instructions += [] if buffer is None else [BackwardPass(buffer)]
            computed = buffer
            yield instructions

    def _backward_unit(self, number: int) -> int:
        """The unit whose backward pass is number `number` of the step."""
        micro_batch, place = divmod(number, self._chunks)
        return (micro_batch + 1) * self._chunks - 1 - place
