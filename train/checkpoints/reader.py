"""Which checkpoint a run goes on from, and how it is read: each rank reads the ranges that it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.accounting import parameter_shapes
from model.config import ModelConfig
from model.locate import complete_checkpoints, step_of
from model.marker import LaterMarkerError, MarkerError, read_marker
from model.weights import LaterWeightsError, WeightsError, WeightsReader, read_model_json
from train.checkpoints.generators import read_generators, restore_generators
from train.checkpoints.lanes import LanesReader
from train.checkpoints.layout import (
    MARKER,
    CheckpointError,
    LaterCheckpointError,
    describe_file,
    generators_file,
)
from train.checkpoints.state import TrainState, read_state
from train.parallel.engine import Engine
from train.parallel.fragments import MOMENTS
from train.parallel.mesh import Mesh


def newest_usable(
    root: Path,
    mesh: Mesh,
    on_rejected: Callable[[Path, str], None],
    last_step: int | None = None,
    is_strict: bool = False,
) -> Path | None:
    """The newest checkpoint under `root` whose every file matches the marker and can be read as what it should be.

    None when there is none at all. Collective: the ranks share the reading and agree. Whatever is wrong with one, it is
    passed over and reported through `on_rejected`; with `is_strict` it ends the run. `last_step`: only checkpoints of
    this step or an earlier one count; None: all.

    Raises LaterCheckpointError for one that a later version of this program wrote. It is not damaged: to go on from an
    older one would train its steps again, and write over and delete what the later version has saved.
    Raises CheckpointError when checkpoints exist but none can be used.
    """
    candidates = [path for path in complete_checkpoints(root) if last_step is None or step_of(path) <= last_step]
    rejected = []
    for name in mesh.broadcast_object([str(path) for path in reversed(candidates)], group="world"):
        folder = Path(name)
        of_ranks = mesh.gather_objects(faults(folder, mesh.rank, mesh.size), group="world")
        found = [fault.problem for of_rank in of_ranks for fault in of_rank]
        if not found:
            return folder
        if later := [fault.problem for of_rank in of_ranks for fault in of_rank if fault.is_later]:
            raise LaterCheckpointError(later[0])
        if is_strict:
            raise CheckpointError(
                f"{folder.name}: {found[0]}. Restore it or move it away, or set checkpoint.on_corrupt=skip to go on "
                "from the one before (fail)"
            )
        rejected.append(f"{folder.name}: {found[0]}")
        on_rejected(folder, found[0])
    if rejected:
        raise CheckpointError(
            f"no checkpoint under {root} can be used ({'; '.join(rejected)}). Restore one of them, or move the folder "
            "away to start the run from its beginning"
        )
    return None


@dataclass(frozen=True)
class Fault:
    """What keeps a checkpoint from being used."""

    problem: str
    # The file is none of this version's, and whole for all that is known.
    is_later: bool = False


def faults(folder: Path, share: int = 0, shares: int = 1) -> list[Fault]:
    """What is wrong with every `shares`-th file of a checkpoint, beginning with number `share`; of share 0 also whether
    all that `load` reads can be opened as what it should be."""
    try:
        read_marker(folder)
        if problems := check(folder, share, shares):
            return [Fault(problem) for problem in problems]
        if share == 0:
            _open_everything(folder)
    except (LaterMarkerError, LaterWeightsError, LaterCheckpointError) as error:
        return [Fault(str(error), is_later=True)]
    except Exception as error:  # noqa: BLE001 - files of any content fail in more ways than can be listed
        known = isinstance(error, CheckpointError | WeightsError | MarkerError)
        return [Fault(str(error) if known else f"{folder} cannot be read ({type(error).__name__}: {error})")]
    return []


def _open_everything(folder: Path) -> None:
    """Open all that `load` will read. Raises CheckpointError, WeightsError, and what files of any content give."""
    files, state = read_marker(folder).files, read_state(folder)
    for rank in range(state.world_size):
        path = generators_file(folder, rank)
        if path.name not in files:
            raise CheckpointError(f"{folder / MARKER} lists no {path.name}, though {state.world_size} ranks saved it")
        read_generators(path)
    weights = WeightsReader(folder / "weights")
    if weights.shapes != parameter_shapes(read_model_json(folder / "weights")):
        raise CheckpointError(f"{folder / 'weights'} holds other parameters than its model.json describes")
    for part in ("weights", *MOMENTS):
        reader = WeightsReader(folder / part)
        reader.check_coverage()
        if reader.shapes != weights.shapes:
            raise CheckpointError(f"{folder / part} holds other parameters than {folder / 'weights'}")
    LanesReader(folder)


def newest_state(root: Path) -> TrainState | None:
    """The state in the newest checkpoint under `root` that has a readable one; None when there is none.

    For a look ahead, by one process alone: nothing but the state is read, and `newest_usable` may pass over it.
    """
    for folder in reversed(complete_checkpoints(root)):
        with contextlib.suppress(CheckpointError):
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
        try:
            if not path.exists():
                problems.append(f"{path} is missing")
            elif path.stat().st_size != expected["bytes"]:
                problems.append(f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}")
            elif describe_file(path) != expected:
                problems.append(f"{path} was altered: its checksum is not that of {MARKER}")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
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
