"""How long the runs of a sweep take, by the calibration of the GPUs that they are for."""

from __future__ import annotations

from collections.abc import Callable

from launch.sweep.manifest import Row
from train.config import RunConfig
from train.estimate.calibration import SHIPPED, read_calibration
from train.estimate.machine import Machine
from train.plan import make_plan

# Hours that a run takes from its first step on with the nodes and processes of its row; None: not known.
Predict = Callable[[RunConfig, Row], float | None]


def predictor(gpu: str) -> Predict:
    """What gives the hours of a whole run on such GPUs, one of train.estimate.calibration.shipped().

    None for a run whose products were not measured, which are those in fp32.
    """
    calibration = read_calibration(SHIPPED / f"{gpu}.json")

    def hours(config: RunConfig, row: Row) -> float | None:
        if not config.precision.is_bf16:
            return None
        machine = Machine(calibration, row.nodes, row.processes)
        seconds = make_plan(config, row.processes, machine=machine).predicted_seconds
        return None if seconds is None else seconds / 3600

    return hours
