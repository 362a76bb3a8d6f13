"""The order of units in a pipeline: every one once, none before what it needs, and the time and memory by formula."""

import itertools

import pytest
from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceGrads, ReduceTiedGrads, TrainSchedule

from tests.runs import ROOT
from tests.train.parallel.simulated_pipeline import Stage, name_of, run
from train.parallel.balance import bubble, units_in_flight
from train.parallel.pipeline_schedule import UnitSchedule

# What DeepSpeed does behind the last backward pass.
LATER = (ReduceTiedGrads, ReduceGrads, OptimizerStep)
# (micro-batches, chunks of each).
CUTS = list(itertools.product((1, 2, 3, 8), (1, 2, 4, 5)))
STAGES = pytest.mark.parametrize("stages", [2, 3, 4, 8])


def simulated(stages, micro_batches, chunks, *times):
    return run((Stage(UnitSchedule(micro_batches, chunks, stages, number)) for number in range(stages)), *times)


@STAGES
def test_every_unit_goes_forward_and_backward_once_and_the_chunks_of_a_micro_batch_backward_in_reverse(stages):
    for micro_batches, chunks in CUTS:
        units = micro_batches * chunks
        expected = [m * chunks + c for m in range(micro_batches) for c in reversed(range(chunks))]
        for number, stage in enumerate(simulated(stages, micro_batches, chunks)):
            assert stage.finished == expected and stage.begun == units and not stage.held
            passes = {"ForwardPass": units, "BackwardPass": units}
            onwards = {"SendActivation": units, "RecvGrad": units} if number < stages - 1 else {}
            backwards = {"RecvActivation": units, "SendGrad": units} if number > 0 else {}
            loaded = {"LoadMicroBatch": units} if number in (0, stages - 1) else {}
            assert stage.counted == passes | onwards | backwards | loaded


@STAGES
@pytest.mark.parametrize("backward_time", [1.0, 2.0, 3.0])
def test_the_time_that_stages_wait_is_the_formula(stages, backward_time):
    """Whatever a backward pass takes, and with neighbours that wait for each other at every exchange."""
    for micro_batches, chunks in CUTS:
        found = simulated(stages, micro_batches, chunks, 1.0, backward_time)
        step = max(stage.time for stage in found)
        for stage in found:
            assert stage.busy == micro_batches * chunks * (1 + backward_time)
            assert 1 - stage.busy / step == pytest.approx(bubble(stages, micro_batches, chunks))


@STAGES
def test_the_units_in_flight_are_the_formula(stages):
    for micro_batches, chunks in CUTS:
        for number, stage in enumerate(simulated(stages, micro_batches, chunks)):
            assert stage.most_held == stage.schedule.num_pipe_buffers()
            assert stage.most_held == units_in_flight(stages, number, micro_batches, chunks)
            assert stage.most_held == min(chunks + stages - 1 - number, micro_batches * chunks)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (2, 4), (3, 2), (4, 8)])
def test_whole_micro_batches_go_in_the_order_of_deepspeed(stages, micro_batches):
    for number in range(stages):
        theirs = [
            [name_of(instruction) for instruction in step if type(instruction) not in LATER]
            for step in TrainSchedule(micro_batches, stages, number).steps()
        ]
        ours = UnitSchedule(micro_batches, 1, stages, number).steps()
        assert [[name_of(instruction) for instruction in step] for step in ours] == theirs


def test_the_order_of_two_stages_is_that_of_the_documentation():
    page = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    for stage in simulated(2, 2, 2):
        forward, backward = itertools.count(1), iter(stage.finished)
        order = []
        for instruction in stage.instructions:
            if name_of(instruction) == "ForwardPass":
                order.append(f"F{next(forward)}")
            elif name_of(instruction) == "BackwardPass":
                order.append(f"B{next(backward) + 1}")
        drawn = page.split(f"\n stage {stage.schedule.stage_id}:   ")[1].partition("\n")[0]
        assert drawn.split() == order
