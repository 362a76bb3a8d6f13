"""Checkpoints that count only when they are whole, load under any layout, and never hold up the loop for a write.

A checkpoint is the folder `checkpoints/step-XXXXXXXX/`:

    weights/model.json, weights/weights-RRRRR.safetensors    fp32 weights, the part that rank R owned (model/weights.py)
    exp_avg/weights-RRRRR.safetensors, exp_avg_sq/...         AdamW's moments, in the same format
    random-RRRRR.json                                         the random generators of rank R
    state.json                                                position, counters, callbacks, layout, identities
    complete.json                                             size and checksum of every other file; written last

Everything that is cut over ranks is stored as named parts of parameters, so another number of ranks or another stage
reads the same files. A folder without complete.json, or with a file that does not match it, is not a checkpoint.
"""

from __future__ import annotations

import base64
import copy
import json
import random
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.files import hash_file, sync
from model.config import ModelConfig
from model.weights import WeightsReader, save_fragments, write_model_json
from train.config import CheckpointConfig
from train.parallel.fragments import MOMENTS, base_optimizer
from train.parallel.zero import Engine, World
from train.run_directory import write_atomically

FORMAT_VERSION = 1
MARKER = "complete.json"
_COMMIT_TIMEOUT_SECONDS = 3600.0


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file and what to do."""


@dataclass
class RunState:
    """Everything of a run that is neither weights nor moments. JSON values only."""

    # Completed steps, those skipped for a non-finite gradient included: they consumed their data.
    step: int = 0
    # Optimizer steps applied; the schedule counts these.
    applied_steps: int = 0
    skipped_steps: int = 0
    tokens: int = 0
    # Index of the next sample of the global order.
    next_sample: int = 0
    # What that index is an index of: the corpus, split, mixture, sequence length and seed.
    data_identity: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    # The layout that wrote the checkpoint, for the log and for restoring random generators.
    world_size: int = 1
    zero_stage: int = 0
    # Resuming under another format is refused.
    format_version: int = FORMAT_VERSION


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders under `root` that carry the marker, oldest first."""
    return [path for path in _step_folders(root) if (path / MARKER).exists()]


def _step_folders(root: Path) -> list[Path]:
    """Folders that `step_folder` names, oldest first; what else a user keeps beside them is not the run's to touch."""
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir())


class CheckpointWriter:
    """Saves in the background: `save` returns when the state is copied to host memory."""

    def __init__(
        self, root: Path, world: World, model: ModelConfig, config: CheckpointConfig, resumed_step: int | None
    ):
        self.root = root
        self.model = model
        self.rank = world.rank
        self.world_size = world.size
        self.keep_last = config.keep_last
        self.keep_every = config.keep_every
        # The step whose checkpoint is on disk already, or on its way.
        self._last_step = resumed_step
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, engine: Engine, state: RunState, on_complete: Callable[[Path, float], None]) -> Path:
        """Copy this rank's part to host memory and start writing it. Collective: every rank calls it at the same step.

        `on_complete(folder, seconds)` runs on rank 0's writing thread once the checkpoint counts.
        Raises CheckpointError when the previous save failed.
        """
        self.wait()
        folder = step_folder(self.root, state.step)
        # Not "has the marker": rank 0 sees that earlier than the others, and they must all agree.
        if state.step == self._last_step:
            return folder
        self._last_step = state.step
        snapshot = _Snapshot.take(engine, state)
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            for name in ("weights", *MOMENTS):
                (folder / name).mkdir(parents=True)
        dist.barrier()
        self._thread = threading.Thread(
            target=self._write, args=(folder, snapshot, on_complete), name="checkpoint-writer"
        )
        self._thread.start()
        return folder

    def wait(self) -> None:
        """Until the save under way has ended. Raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(
                f"writing the checkpoint under {self.root} failed on rank {self.rank}: {error}. Earlier checkpoints "
                "are untouched; make room or repair the disk and start the same command again"
            ) from error

    def _write(self, folder: Path, snapshot: _Snapshot, on_complete: Callable[[Path, float], None]) -> None:
        started = time.monotonic()
        try:
            files = snapshot.write(folder, self.rank, self.model)
            report = {str(path.relative_to(folder)): _describe(path) for path in files}
            write_atomically(folder / f"rank-{self.rank:05d}.json", json.dumps(report))
            if self.rank == 0:
                self._commit(folder)
                on_complete(folder, time.monotonic() - started)
                self._prune(folder)
        except BaseException as error:  # noqa: BLE001 - handed to the training thread by wait()
            self._error = error

    def _commit(self, folder: Path) -> None:
        """Write the marker once every rank has reported its files. Ranks meet on the file system: a collective on this
        thread could overtake one of the training thread."""
        reports = [folder / f"rank-{rank:05d}.json" for rank in range(self.world_size)]
        deadline = time.monotonic() + _COMMIT_TIMEOUT_SECONDS
        while not all(report.exists() for report in reports):
            if time.monotonic() > deadline:
                missing = [report.name for report in reports if not report.exists()]
                raise CheckpointError(f"{folder}: no word from {', '.join(missing)} within {_COMMIT_TIMEOUT_SECONDS} s")
            time.sleep(0.02)
        files: dict[str, Any] = {}
        for report in reports:
            files |= json.loads(report.read_text(encoding="utf-8"))
        _sync_folders(folder)
        marker = {"format_version": FORMAT_VERSION, "files": files}
        write_atomically(folder / MARKER, json.dumps(marker, indent=1))
        for report in reports:
            report.unlink()
        _sync_folders(folder)

    def _prune(self, newest: Path) -> None:
        # A later one was damaged and passed over by the resume: it takes no place among those that are kept.
        complete = [folder for folder in complete_checkpoints(self.root) if folder <= newest]
        for folder in complete[: -self.keep_last]:
            step = int(folder.name.removeprefix("step-"))
            if self.keep_every is None or step % self.keep_every:
                (folder / MARKER).unlink()
                shutil.rmtree(folder)


@dataclass
class _Snapshot:
    """Host copies of one rank's part."""

    shapes: dict[str, tuple[int, ...]]
    tensors: dict[str, list[tuple[str, int, torch.Tensor]]]
    state: RunState
    generators: dict[str, Any]

    @classmethod
    def take(cls, engine: Engine, state: RunState) -> _Snapshot:
        owned = [fragment for fragment in engine.fragments if fragment.owned]
        optimizer = base_optimizer(engine.deepspeed)
        tensors = {"weights": [(f.name, f.offset, _host_copy(f.master)) for f in owned]}
        for key in MOMENTS:
            tensors[key] = [(f.name, f.offset, _host_copy(f.moment(optimizer, key))) for f in owned]
        if engine.world.device.type == "cuda":
            torch.cuda.synchronize(engine.world.device)
        return cls(engine.shapes, tensors, copy.deepcopy(state), _generator_states(engine.world.device))

    def write(self, folder: Path, rank: int, model: ModelConfig) -> list[Path]:
        files = []
        for name, fragments in self.tensors.items():
            if fragments:
                path = folder / name / f"weights-{rank:05d}.safetensors"
                save_fragments(path, fragments, self.shapes)
                files.append(path)
        generators = folder / f"random-{rank:05d}.json"
        generators.write_text(json.dumps(self.generators), encoding="utf-8")
        files.append(generators)
        if rank == 0:
            files.append(write_model_json(folder / "weights", model))
            state = folder / "state.json"
            state.write_text(json.dumps(asdict(self.state), indent=1), encoding="utf-8")
            files.append(state)
        for path in files:
            sync(path)
        return files


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _describe(path: Path) -> dict[str, Any]:
    found = hash_file(path, with_sha256=False)
    return {"bytes": found.bytes, "xxh3_128": found.xxh3_128}


def _sync_folders(folder: Path) -> None:
    for path in (folder / "weights", *(folder / key for key in MOMENTS), folder, folder.parent):
        sync(path)


def newest_usable(root: Path, on_rejected: Callable[[Path, str], None]) -> Path | None:
    """The newest checkpoint under `root` whose every file matches the marker; None when there is none at all.

    Collective: the ranks share the reading and agree. Those passed over are reported through `on_rejected`.
    Raises CheckpointError when checkpoints exist but none can be used.
    """
    candidates = list(reversed(complete_checkpoints(root)))
    agreed: list[Any] = [[str(path) for path in candidates]]
    dist.broadcast_object_list(agreed)
    rejected = []
    for name in agreed[0]:
        folder = Path(name)
        problems: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(problems, check(folder, dist.get_rank(), dist.get_world_size()))
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


def check(folder: Path, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with every `shares`-th file of a checkpoint, beginning with number `share`; [] when all is well."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files = marker["files"]
        version = marker["format_version"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{folder / MARKER} cannot be read: {error}"]
    if version != FORMAT_VERSION:
        return [
            f"{folder / MARKER} has format_version {version}; this version of xlstm-pretrain reads {FORMAT_VERSION}"
        ]
    problems = []
    for name in sorted(files)[share::shares]:
        path, expected = folder / name, files[name]
        if not path.exists():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}")
        elif _describe(path) != expected:
            problems.append(f"{path} was altered: its checksum is not that of {MARKER}")
    return problems


def read_state(folder: Path) -> RunState:
    """The state in a checkpoint. Raises CheckpointError when another version of this program wrote it."""
    path = folder / "state.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {content.get('format_version')}; this version of xlstm-pretrain reads "
            f"{FORMAT_VERSION}"
        )
    return RunState(**content)


def load(folder: Path, engine: Engine) -> RunState:
    """Restore weights, moments and random generators of this rank from a checkpoint that `newest_usable` returned.

    Random generators come back only under the number of ranks that saved them; `RunState.world_size` tells.
    Raises CheckpointError when the checkpoint is of another model.
    """
    state = read_state(folder)
    weights = WeightsReader(folder / "weights")
    weights.check_coverage()
    if weights.shapes != engine.shapes:
        differing = sorted(set(weights.shapes.items()) ^ set(engine.shapes.items()))
        raise CheckpointError(
            f"{folder} is of another model than model=... describes: {len(differing)} parameters differ, for example "
            f"{differing[0][0]} {list(differing[0][1])}. Give the run another name, or the model of "
            f"{folder / 'weights'}"
        )
    engine.fill(
        lambda name: weights.read_range(name, 0, torch.Size(weights.shapes[name]).numel()).view(weights.shapes[name]),
        state.applied_steps,
    )
    optimizer = base_optimizer(engine.deepspeed)
    for key in MOMENTS:
        reader = WeightsReader(folder / key)
        reader.check_coverage()
        for fragment in engine.fragments:
            fragment.moment(optimizer, key).copy_(reader.read_range(fragment.name, fragment.offset, fragment.numel))
    if state.world_size == engine.world.size:
        generators = json.loads((folder / f"random-{engine.world.rank:05d}.json").read_text(encoding="utf-8"))
        _restore_generators(generators, engine.world.device)
    return state


def _python_generator_state() -> list[Any]:
    version, internal, gauss_next = random.getstate()
    return [version, list(internal), gauss_next]


def _generator_states(device: torch.device) -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": _python_generator_state(),
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    if device.type == "cuda":
        states["cuda"] = base64.b64encode(torch.cuda.get_rng_state(device).numpy().tobytes()).decode()
    return states


def _restore_generators(states: dict[str, Any], device: torch.device) -> None:
    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensor(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(tensor(states["cuda"]), device)


def remove_torn(root: Path) -> list[str]:
    """Delete folders of saves that never completed; returns their names. Rank 0 only, before the first save."""
    torn = [path for path in _step_folders(root) if not (path / MARKER).exists()]
    for path in torn:
        shutil.rmtree(path)
    return [path.name for path in torn]
