"""What of a run is neither weights nor moments: position, counters, callbacks, layout, identities."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conf.problems import ConfigError
from train.checkpoints.layout import FORMAT_VERSION, STATE_JSON, CheckpointError, refuse_other_format
from train.stored_configuration import read_configuration


@dataclass
class TrainState:
    """Everything of a run that is neither weights nor moments. JSON values only."""

    # Completed steps, those skipped for a non-finite gradient included: they consumed their data.
    step: int = 0
    # Optimizer steps applied; the schedule of a run whose length is given in steps counts these.
    applied_steps: int = 0
    skipped_steps: int = 0
    # Tokens of completed steps; a budget in tokens counts these.
    tokens: int = 0
    # Tokens of applied steps; the schedule of a run whose length is given in tokens counts these.
    applied_tokens: int = 0
    # Tokens that such a schedule counts as one of its steps: those of a step of the run when the schedule was set.
    schedule_step_tokens: int = 0
    # Index of the next sample of the global order.
    next_sample: int = 0
    # What that index is an index of: the corpus, split, mixture, sequence length and seed.
    data_identity: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    # The whole configuration that trained the last of these steps; {} when it is not known.
    configuration: dict[str, Any] = field(default_factory=dict)
    # The layout that wrote the checkpoint, for the log and for restoring random generators.
    world_size: int = 1
    zero_stage: int = 0
    # Resuming under another format is refused.
    format_version: int = FORMAT_VERSION


_NOT_YET_IN_0_2_0 = {"applied_tokens", "schedule_step_tokens", "configuration"}


def write_state(folder: Path, state: TrainState) -> Path:
    """Write `state` into a checkpoint; returns the file's path."""
    path = folder / STATE_JSON
    path.write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    return path


def read_state(folder: Path) -> TrainState:
    """The state in a checkpoint.

    Raises LaterCheckpointError when a later version of this program wrote it, CheckpointError for whatever else is
    wrong with it.
    """
    path = folder / STATE_JSON
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} cannot be read: it is {'no regular file' if path.exists() else 'missing'}")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be read: it holds no JSON object")
    refuse_other_format(path, content.get("format_version"))
    kinds = {name: type(value) for name, value in asdict(TrainState()).items()}
    wrong = sorted(name for name, value in content.items() if type(value) is not kinds.get(name))
    if wrong or not kinds.keys() - content.keys() <= _NOT_YET_IN_0_2_0:
        missing = sorted(kinds.keys() - content.keys() - _NOT_YET_IN_0_2_0)
        raise CheckpointError(
            f"{path} cannot be read: keys are missing ({missing}), unknown or of a wrong type ({wrong})"
        )
    return TrainState(**{**_not_yet_in_0_2_0(folder, content), **content})


def _not_yet_in_0_2_0(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What a state of version 0.2.0 or before leaves to be derived: its run had one batch size and sequence length."""
    if content.keys() >= _NOT_YET_IN_0_2_0:
        return {}
    step, tokens = content["step"], content["tokens"]
    configuration: dict[str, Any] = {}
    # Where it is not there, or damaged, it is not known.
    with contextlib.suppress(ConfigError):
        configuration = read_configuration(folder.parent.parent / "config.yaml")
    return {
        "applied_tokens": tokens * content["applied_steps"] // step if step else 0,
        "schedule_step_tokens": tokens // step if step else 0,
        "configuration": configuration,
    }
