"""What of a run is neither weights nor moments: position, counters, callbacks, layout, identities."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.checkpoints.layout import FORMAT_VERSION, STATE_JSON, CheckpointError


@dataclass
class TrainState:
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


def write_state(folder: Path, state: TrainState) -> Path:
    """Write `state` into a checkpoint; returns the file's path."""
    path = folder / STATE_JSON
    path.write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    return path


def read_state(folder: Path) -> TrainState:
    """The state in a checkpoint. Raises CheckpointError when another version of this program wrote it."""
    path = folder / STATE_JSON
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {content.get('format_version')}; this version of xlstm-pretrain reads "
            f"{FORMAT_VERSION}"
        )
    return TrainState(**content)
