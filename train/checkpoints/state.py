"""What of a run is neither weights nor moments: position, counters, callbacks, layout, identities."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.problems import other_format
from train.checkpoints.layout import FORMAT_VERSION, STATE_JSON, CheckpointError


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


def write_state(folder: Path, state: TrainState) -> Path:
    """Write `state` into a checkpoint; returns the file's path."""
    path = folder / STATE_JSON
    path.write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    return path


def read_state(folder: Path) -> TrainState:
    """The state in a checkpoint. Raises CheckpointError when another version of this program wrote it."""
    path = folder / STATE_JSON
    content = json.loads(path.read_text(encoding="utf-8"))
    if problem := other_format(path, content.get("format_version"), FORMAT_VERSION):
        raise CheckpointError(problem)
    return TrainState(**{**_not_yet_in_0_2_0(folder, content), **content})


def _not_yet_in_0_2_0(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What a state of version 0.2.0 or before leaves to be derived: its run had one batch size and sequence length."""
    step, tokens = content["step"], content["tokens"]
    config = folder.parent.parent / "config.yaml"
    return {
        "applied_tokens": tokens * content["applied_steps"] // step if step else 0,
        "schedule_step_tokens": tokens // step if step else 0,
        "configuration": OmegaConf.to_container(OmegaConf.load(config)) if config.is_file() else {},
    }
