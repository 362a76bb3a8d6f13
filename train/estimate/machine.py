"""The GPUs of a run, as its plan knows them: their calibration, and what connects them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from train.estimate.calibration import SHIPPED, Calibration, read_calibration, shipped
from train.estimate.coefficients import Coefficients, fit
from train.estimate.links import Links
from train.estimate.rates import Rates

# What is usual: GPUs of a node, and Gbit/s of the network for each.
GPUS_PER_NODE = 8
NETWORK_GBIT = 400.0


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind that were calibrated.

    Attributes:
        calibration: of the GPUs.
        nodes, ranks: of the run.
        network_gbit: of the network between nodes, for each GPU of a node.
    """

    calibration: Calibration
    nodes: int
    ranks: int
    network_gbit: float = NETWORK_GBIT

    @property
    def device(self) -> str:
        return self.calibration.device

    @cached_property
    def rates(self) -> Rates:
        return Rates(self.calibration)

    @cached_property
    def coefficients(self) -> Coefficients:
        return fit(self.calibration)

    @cached_property
    def links(self) -> Links:
        return Links.of(self.calibration, self.nodes, self.ranks, self.network_gbit)


def machine_of(device: str, ranks: int) -> Machine | None:
    """So many GPUs by the name that torch.cuda.get_device_name gives, on usual nodes; None: they are not calibrated."""
    calibration = shipped_calibrations().get(device)
    if calibration is None:
        return None
    return Machine(calibration, math.ceil(ranks / GPUS_PER_NODE), ranks)


@lru_cache
def shipped_calibrations() -> dict[str, Calibration]:
    """The calibrations that come with this package, by the name of the GPU."""
    found = [read_calibration(SHIPPED / f"{name}.json") for name in shipped()]
    return {calibration.device: calibration for calibration in found}
