"""From what a user names (a run, a checkpoint, a weights directory) to the weights and the tokenizer in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from model.weights import MODEL_JSON, WeightsError

# Written last into a checkpoint: a folder without it is none.
COMPLETE = "complete.json"
HUGGINGFACE_CONFIG = "config.json"


@dataclass(frozen=True)
class Located:
    weights: Path
    # Directory or file of the tokenizer; None where there is none beside the weights.
    tokenizer: Path | None
    # Tokens of a sample in training; None where no run is around the weights.
    sequence_length: int | None = None


def locate(path: str | Path) -> Located:
    """Find the weights that `path` means.

    `path` is a run's directory (its newest complete checkpoint counts), a checkpoint's (step-XXXXXXXX) or one in the
    format of model/weights.py. A checkpoint's tokenizer is the run's; else it is looked for in `path`/tokenizer.
    Raises WeightsError when `path` is none of these, or a checkpoint that is not complete.
    """
    path = Path(path).absolute()
    if (path / MODEL_JSON).is_file():
        if path.parent.name.startswith("step-"):
            return locate(path.parent)
        return Located(path, _tokenizer(path))
    if path.name.startswith("step-") or (path / "weights").is_dir():
        if not (path / COMPLETE).is_file():
            raise WeightsError(f"{path} is no complete checkpoint: it has no {COMPLETE}, its writing was interrupted")
        run = path.parent.parent
        return Located(path / "weights", _tokenizer(run), _sequence_length(run))
    steps = sorted((path / "checkpoints").glob("step-*"), key=lambda step: step.name)
    complete = [step for step in steps if (step / COMPLETE).is_file()]
    if complete:
        return locate(complete[-1])
    if steps:
        raise WeightsError(f"{path} has no complete checkpoint among {len(steps)} in {path / 'checkpoints'}")
    if not path.is_dir():
        raise WeightsError(f"{path} does not exist; name a run directory, a checkpoint or a weights directory")
    hint = ""
    if is_huggingface(path):
        hint = ". It looks like a Hugging Face model: convert it first with `python -m model import`"
    raise WeightsError(f"{path} is no run directory, checkpoint or weights directory{hint}")


def is_huggingface(path: Path) -> bool:
    """Whether `path` is a model directory of transformers."""
    return (path / HUGGINGFACE_CONFIG).is_file() and not (path / MODEL_JSON).is_file()


def _tokenizer(directory: Path) -> Path | None:
    return directory / "tokenizer" if (directory / "tokenizer").is_dir() else None


def _sequence_length(run: Path) -> int | None:
    path = run / "config.yaml"
    configuration = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    training = configuration.get("training") if isinstance(configuration, dict) else None
    return training.get("sequence_length") if isinstance(training, dict) else None
