"""All stages of a pipeline in one process, by the instructions that DeepSpeed's engine would get.

As on gloo and NCCL, whoever sends waits for the one who receives. So an order that would hang hangs here, and time can
be counted in units of any size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

MATCHING = {"SendActivation": "RecvActivation", "SendGrad": "RecvGrad"}
Step = list[PipeInstruction]


class Stage:
    """One stage: its instructions, and what it has done. A subclass computes something."""

    def __init__(self, schedule: PipeSchedule):
        self.schedule = schedule
        self.instructions = [instruction for step in schedule.steps() for instruction in step]
        self.counted = Counter(name_of(instruction) for instruction in self.instructions)
        self.next = 0
        self.time = self.busy = 0.0
        # Buffer -> number of the unit in it; finished ones in the order of their backward passes.
        self.held: dict[int, int] = {}
        self.most_held = self.begun = 0
        self.finished: list[int] = []
        self.inputs: dict[int, object] = {}
        self.outputs: dict[int, object] = {}

    @property
    def current(self) -> PipeInstruction | None:
        return self.instructions[self.next] if self.next < len(self.instructions) else None

    def forward(self, unit: int, received: object) -> object:
        """What goes to the next stage."""
        return unit

    def backward(self, unit: int, output: object, gradient: object) -> object:
        """What goes to the stage before."""
        return unit

    def compute(self, forward_time: float, backward_time: float) -> None:
        """Do what needs no other stage, up to what does."""
        while self.current is not None and (name := name_of(self.current)) not in (*MATCHING, *MATCHING.values()):
            buffer = self.current.kwargs["buffer_id"]
            self.next += 1
            if name == "LoadMicroBatch":
                continue
            taken = forward_time if name == "ForwardPass" else backward_time
            self.time += taken
            self.busy += taken
            if name == "ForwardPass":
                assert buffer not in self.held and 0 <= buffer < self.schedule.num_pipe_buffers()
                self.held[buffer] = unit = self.begun
                self.begun += 1
                self.most_held = max(self.most_held, len(self.held))
                self.outputs[buffer] = self.forward(unit, self.inputs.get(buffer))
            else:
                unit = self.held.pop(buffer)
                self.finished.append(unit)
                self.inputs[buffer] = self.backward(unit, self.outputs.pop(buffer), self.inputs.get(-1))

    def sent(self) -> object:
        """What the current instruction sends."""
        of = self.outputs if name_of(self.current) == "SendActivation" else self.inputs
        return of[self.current.kwargs["buffer_id"]]

    def take(self, value: object) -> None:
        """What the current instruction receives: of gradients there is one at a time, as in DeepSpeed."""
        self.inputs[-1 if name_of(self.current) == "RecvGrad" else self.current.kwargs["buffer_id"]] = value


def name_of(instruction: PipeInstruction) -> str:
    return type(instruction).__name__


def run(stages: Iterable[Stage], forward_time: float = 1.0, backward_time: float = 1.0) -> list[Stage]:
    """Run all stages to their ends."""
    stages = list(stages)
    while True:
        for stage in stages:
            stage.compute(forward_time, backward_time)
        if all(stage.current is None for stage in stages):
            return stages
        assert any([exchange(*pair) for pair in zip(stages, stages[1:], strict=False)]), "stages wait for each other"


def exchange(before: Stage, behind: Stage) -> bool:
    """Whether two neighbours were both ready to send and receive, and have."""
    for sender, receiver in ((before, behind), (behind, before)):
        if sender.current is None or receiver.current is None:
            return False
        kind = "SendActivation" if sender is before else "SendGrad"
        if name_of(sender.current) == kind and name_of(receiver.current) == MATCHING[kind]:
            receiver.take(sender.sent())
            sender.time = receiver.time = max(sender.time, receiver.time)
            sender.next += 1
            receiver.next += 1
            return True
    return False
