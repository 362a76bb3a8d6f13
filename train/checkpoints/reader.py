"""Which checkpoint a run goes on from, and how it is read: each rank reads the ranges that it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from model.accounting import parameter_shapes
from model.config import ModelConfig
from model.locate import complete_checkpoints, step_of
from model.marker import MarkerError, read_marker
from model.weights import WeightsReader
from train.checkpoints.generators import restore_generators
from train.checkpoints.layout import (
    MARKER,
    CheckpointError,
    describe_file,
    generators_file,
)
from train.checkpoints.state import TrainState, read_state
from train.parallel.engine import Engine
from train.parallel.fragments import MOMENTS
from train.parallel.mesh import Mesh


def newest_usable(
    root: Path, mesh: Mesh, on_rejected: Callable[[Path, str], None], last_step: int | None = None
) -> Path | None:
    """The newest checkpoint under `root` whose every file matches the marker; None when there is none at all.

    Collective: the ranks share the reading and agree. Those passed over are reported through `on_rejected`.
    `last_step`: only checkpoints of this step or an earlier one count; None: all.
    Raises CheckpointError when checkpoints exist but none can be used.
    """
    candidates = [path for path in complete_checkpoints(root) if last_step is None or step_of(path) <= last_step]
    rejected = []
    for name in mesh.broadcast_object([str(path) for path in reversed(candidates)], group="world"):
        folder = Path(name)
        problems = mesh.gather_objects(check(folder, mesh.rank, mesh.size), group="world")
        found = [problem for of_rank in problems for problem in of_rank]
        if not found:
            return folder
        rejected.append(f"{folder.name}: {found[0]}")
        on_rejected(folder, found[0])
    if rejected:
        raise CheckpointError(
            f"no checkpoint under {root} can be used ({'; '.join(rejected)}). Restore one of them, or move the folder "
            "away to start the run from its beginning"
        )
    return None


def newest_state(root: Path) -> TrainState | None:
    """The state in the newest checkpoint under `root` that has a readable one; None when there is none.

    For a look ahead, by one process alone: nothing but the state is read, and `newest_usable` may pass over it.
    """
    for folder in reversed(complete_checkpoints(root)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, CheckpointError):
            return read_state(folder)
    return None


def check(folder: Path, share: int = 0, shares: int = 1, part: str = "") -> list[str]:
    """What is wrong with every `shares`-th file of a checkpoint, beginning with number `share`; [] when all is well.

    `part`: look only at files whose paths begin with it, such as "weights/".
    """
    try:
        files = read_marker(folder).files
    except MarkerError as error:
        return [str(error)]
    problems = []
    for name in sorted(name for name in files if name.startswith(part))[share::shares]:
        path, expected = folder / name, files[name]
        if not path.exists():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}")
        elif describe_file(path) != expected:
            problems.append(f"{path} was altered: its checksum is not that of {MARKER}")
    return problems


def load(folder: Path, engine: Engine, model: ModelConfig) -> TrainState:
    """Restore weights, moments and random generators of this rank from a checkpoint that `newest_usable` returned.

    Random generators come back only under the number of ranks that saved them; `TrainState.world_size` tells.
    Raises CheckpointError when the checkpoint is of another model than `model`.
    """
    state = read_state(folder)
    weights = WeightsReader(folder / "weights")
    weights.check_coverage()
    expected = parameter_shapes(model)
    if weights.shapes != expected:
        differing = sorted(set(weights.shapes.items()) ^ set(expected.items()))
        raise CheckpointError(
            f"{folder} is of another model than model=... describes: {len(differing)} parameters differ, for example "
            f"{differing[0][0]} {list(differing[0][1])}. Give the run another name, or the model of "
            f"{folder / 'weights'}"
        )
    engine.fill(weights.read_range, state.applied_steps)
    for key in MOMENTS:
        reader = WeightsReader(folder / key)
        reader.check_coverage()
        for fragment in engine.fragments:
            fragment.moment(key).copy_(reader.read_range(fragment.name, fragment.offset, fragment.numel))
    mesh = engine.mesh
    if state.world_size == mesh.size:
        restore_generators(generators_file(folder, mesh.rank), mesh.device)
    return state
