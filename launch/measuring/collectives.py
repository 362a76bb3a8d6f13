"""Times of the collectives of a run among all processes that were started."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch

from train.estimate.calibration import CollectivePoint
from train.parallel.mesh import Mesh

_REPETITIONS = 10


def measure_collectives(mesh: Mesh, mib: int) -> list[CollectivePoint]:
    """An all-reduce and an all-gather of so many MiB; the slowest process counts. Collective."""
    whole = torch.ones(mib * 2**18, device=mesh.device)
    part = whole.new_ones(whole.numel() // mesh.size)

    def gather() -> None:
        _, wait = mesh.start_gather(part, group="world")
        wait()

    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: mesh.sum(whole, group="world"),
        "all_gather": gather,
    }
    nodes = max(1, mesh.size // int(os.environ.get("LOCAL_WORLD_SIZE", mesh.size)))
    points = []
    for name, call in calls.items():
        seconds = max(mesh.gather_objects(_seconds_of(call, mesh), group="world"))
        points.append(CollectivePoint(name, nodes, mesh.size, whole.nbytes, seconds))
    return points


def _seconds_of(call: Callable[[], object], mesh: Mesh) -> float:
    times = []
    for _ in range(_REPETITIONS):
        mesh.barrier(group="world")
        _wait(mesh.device)
        began = time.perf_counter()
        call()
        _wait(mesh.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
