"""Where a run begins that does not begin from its seed: from weights of another (`initialise_from`), or at a step of
another run (`resume_from`), as a branch of it.

Both name their source in the grammar of model/locate.py. Once a run has a checkpoint of its own it goes on from that,
and its source is not looked at again.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.corpus.files import hash_file, sync
from data_pipeline.errors import TokenizerError
from data_pipeline.tokenizing.tokenizer import Tokenizer
from model.config import ModelConfig
from model.loading import StoredModel, open_stored
from model.locate import complete_checkpoints, step_folder
from model.marker import read_marker
from model.stored import differences
from train.checkpoints.layout import (
    MARKER,
    STATE_JSON,
    CheckpointError,
    begin_staging,
    describe_file,
    mark_complete,
    put_in_place,
)
from train.checkpoints.reader import check
from train.checkpoints.state import TrainState, read_state, write_state
from train.config import RunConfig
from train.data import RunCorpus
from train.length import steps_left
from train.parallel.mesh import Mesh
from train.run_directory import Attempt, RunDirectory, read_events
from train.stored_configuration import as_override, written

# The events that tell where a run began.
EVENTS = ("initialise", "branch")
KEYS = ("initialise_from", "resume_from")


@dataclass(frozen=True)
class Origin:
    """What a run begins with. `key`: the one of KEYS that names it."""

    key: str
    stored: StoredModel
    # Of a branch: what it goes on from. None: everything but the weights begins anew.
    state: TrainState | None

    @property
    def is_branch(self) -> bool:
        return self.key == "resume_from"

    def ancestry(self) -> dict[str, Any]:
        """What an event says of it. `attempt`: which start of that run saved the checkpoint, from 1."""
        located = self.stored.located
        found = {"source": str(located.checkpoint or located.weights), "run": None, "step": located.step}
        found |= {"attempt": None, "xxh3_128": None}
        if located.checkpoint is not None:
            # The marker lists the checksum of every other file.
            found["xxh3_128"] = hash_file(located.checkpoint / MARKER, with_sha256=False).xxh3_128
        if located.run is not None:
            found |= {"run": str(located.run), "attempt": _attempt(located.run, located.step)}
        return found


def validate_origin(config: RunConfig) -> list[str]:
    """Every problem of KEYS that shows without the source, one line each."""
    given = {key: getattr(config, key) for key in KEYS}
    problems = [
        f"{key}: empty; name a run, RUN@STEP or a checkpoint, or set it to null"
        for key, value in given.items()
        if value is not None and not value.strip()
    ]
    if not problems and all(value is not None for value in given.values()):
        problems.append(
            f"initialise_from: set initialise_from ({config.initialise_from}: its weights, everything else fresh) or "
            f"resume_from ({config.resume_from}: optimizer, counters and place in the data too), and the other to null"
        )
    return problems


def open_origin(config: RunConfig, directory: RunDirectory) -> tuple[Origin | None, list[str]]:
    """What the run begins with, and why it cannot; None where it begins from its seed or has begun already.

    Reads no weights.
    """
    key = next((key for key in KEYS if getattr(config, key) is not None), None)
    if key is None or complete_checkpoints(directory.checkpoints):
        return None, []
    name = getattr(config, key)
    try:
        stored, state = open_stored(name), None
        if key == "resume_from":
            if stored.located.checkpoint is None:
                return None, [
                    f"resume_from: {name} has weights but no optimizer, counters or place in the data; name a run, "
                    f"RUN@STEP or a checkpoint, or begin with its weights alone: initialise_from={name}"
                ]
            state = read_state(stored.located.checkpoint)
    # WeightsError, HuggingFaceError, CheckpointError; and a file that cannot be read.
    except (ValueError, OSError, CheckpointError) as error:
        return None, [f"{key}: {error}"]
    origin = Origin(key, stored, state)
    return origin, _misfits_of_model(origin, name, config.model)


def _misfits_of_model(origin: Origin, name: str, wanted: ModelConfig) -> list[str]:
    differing, run = differences(wanted, origin.stored.config), origin.stored.located.run
    if not differing:
        return []
    here = ", ".join(f"{path}={written(one)}" for path, (one, _) in differing.items())
    there = " ".join(shlex.quote(f"model.{path}={as_override(other)}") for path, (_, other) in differing.items())
    all_settings = f", start with its settings (--config {run})" if run and RunDirectory(run).config.is_file() else ""
    return [
        f"{origin.key}: the model of {name} differs from this run's ({here}); to take its model, choose the model=... "
        f"that it was trained with{all_settings}, or add {there}"
    ]


def misfits_of_tokenizer(origin: Origin | None, corpus: RunCorpus) -> list[str]:
    """Where the ids of the corpus mean other text to the weights."""
    if origin is None or origin.stored.located.tokenizer is None:
        return []
    return other_tokenizer(origin.key, origin.stored.located.tokenizer, corpus)


def other_tokenizer(model: str, path: Path, corpus: RunCorpus) -> list[str]:
    """Where the tokenizer at `path`, that of a model, gives other ids than the corpus has; `model`: what names it."""
    ours = corpus.tokenizer()
    try:
        theirs = _load_tokenizer(path, ours.eod_token)
    except TokenizerError as error:
        return [f"{model}: its tokenizer cannot be read ({error}); restore {path}, or move it away"]
    if ours.gives_same_ids(theirs):
        return []
    return [
        f"corpus.directory: {corpus.directory} was prepared with another tokenizer than the weights were trained with "
        f"({ours.vocab_size} and {theirs.vocab_size} ids), so its ids mean other text to them; prepare the text with "
        f"theirs: python -m data_pipeline prepare ... tokenizer=file tokenizer.path={theirs.path}"
    ]


def unknown_tokenizer(model: str | Path) -> str:
    """What to warn of where no tokenizer lies beside a model."""
    return f"{model} has no tokenizer: do its ids mean the same text?"


def _load_tokenizer(path: Path, eod_token: str) -> Tokenizer:
    try:
        return Tokenizer.load(path)
    except TokenizerError:
        # A Hugging Face directory may leave the end-of-document token open.
        return Tokenizer.load(path, eod_token)


def misfits_of_position(origin: Origin | None, config: RunConfig) -> list[str]:
    """Where a branch could not go on from its step, whatever the data."""
    if origin is None or origin.state is None:
        return []
    state, problems = origin.state, []
    if not steps_left(config, state):
        key = "total_steps" if config.training.total_tokens is None else "total_tokens"
        problems.append(
            f"training.{key}: the branch begins at step {state.step}, {state.tokens:,} tokens, and has nothing left to "
            f"do ({getattr(config.training, key)}); its length counts from its parent's beginning: set it higher"
        )
    seed = state.data_identity.get("seed", config.seed)
    if seed != config.seed:
        problems.append(f"seed: a branch keeps its parent's order of samples; set it to {seed} ({config.seed})")
    return problems


def changes_of_origin(config: RunConfig, stored: dict[str, Any], directory: RunDirectory) -> list[str]:
    """Where a run that has begun is to begin from something else. `stored`: its config.yaml."""
    if not complete_checkpoints(directory.checkpoints):
        return []
    problems = []
    for key in KEYS:
        before, now = stored.get(key), getattr(config, key)
        if _place(before) != _place(now):
            start = f"{key}={before}" if before is not None else f"no {key}"
            problems.append(
                f"{key}: {directory.path} was started with {start} and goes on from its own checkpoints; start it with "
                "the same again, or give the new run another name=..."
            )
    return problems


def _place(reference: str | None) -> str | None:
    return None if reference is None else os.path.realpath(str(reference))


def take_up(origin: Origin, mesh: Mesh, directory: RunDirectory, attempt: Attempt) -> list[str]:
    """Check the source's files, and give a branch its parent's checkpoint as its first. Collective.

    Returns what is wrong with the files, the same on all ranks.
    """
    if origin.stored.located.checkpoint is None:
        return []
    checkpoint = origin.stored.located.checkpoint
    part = "" if origin.is_branch else "weights/"
    of_ranks = mesh.gather_objects(check(checkpoint, mesh.rank, mesh.size, part), group="world")
    if problems := [problem for of_rank in of_ranks for problem in of_rank]:
        return [f"{origin.key}: {checkpoint} is damaged ({problems[0]}); name another checkpoint"]
    if origin.state is not None and mesh.is_main:
        _adopt(checkpoint, origin.state, directory.checkpoints, attempt.identity)
    mesh.barrier(group="world")
    return []


def _adopt(checkpoint: Path, state: TrainState, root: Path, attempt: str) -> None:
    """Make `checkpoint` one of the run with the folder `root` for checkpoints: from then on the run needs no other.

    Its files are never written to, so the two share them where the file system can. Only its state is written anew:
    one of version 0.2.0 leaves out what is found beside it in the parent's folder.
    """
    files = read_marker(checkpoint).files
    folder = begin_staging(step_folder(root, state.step), attempt, ("weights",))
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name != STATE_JSON:
            _link_or_copy(checkpoint / name, folder / name)
    files = {**files, STATE_JSON: describe_file(write_state(folder, state))}
    for path in {folder, folder / STATE_JSON, *(path.parent for path in folder.rglob("*"))}:
        sync(path)
    mark_complete(folder, attempt, files)
    put_in_place(folder, step_folder(root, state.step))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without links, or another user's files.
        shutil.copyfile(source, target)
        sync(target)


def read_ancestry(run_directory: Path) -> dict[str, Any] | None:
    """What the run's events say of where it began; None: from its seed."""
    with contextlib.suppress(FileNotFoundError):
        for event in reversed(read_events(run_directory)):
            if event["event"] in EVENTS:
                return {key: value for key, value in event.items() if key != "time"}
    return None


def _attempt(run: Path, step: int | None) -> int | None:
    """Which start of `run` saved the checkpoint of `step`, from 1; None where its events do not say."""
    starts, found = 0, None
    with contextlib.suppress(OSError, ValueError):
        for event in read_events(run):
            starts += event["event"] in ("start", "resume")
            if event["event"] == "save" and event["step"] == step:
                found = starts
    return found
