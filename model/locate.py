"""From what a user names to the weights and the tokenizer in it. One grammar for every command and function:

runs/first                               a run: its newest complete checkpoint
runs/first@1000                          a run's checkpoint of 1000 completed steps
runs/first/checkpoints/step-00001000     a checkpoint
weights/averaged                         a weights directory (model/weights.py)
exported                                 a Hugging Face directory
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from model.marker import COMPLETE, LaterMarkerError, MarkerError, is_marked, read_marker
from model.weights import MODEL_JSON, WeightsError

HUGGINGFACE_CONFIG = "config.json"
# For help texts and messages.
GRAMMAR = (
    "a run's directory (its newest complete checkpoint), RUN@STEP, a checkpoint, a weights directory or a Hugging Face "
    "directory"
)


@dataclass(frozen=True)
class Located:
    # A weights directory, or a Hugging Face directory.
    weights: Path
    # Directory or file of the tokenizer; None where there is none beside the weights.
    tokenizer: Path | None
    # The checkpoint that the weights are a part of; None: of none.
    checkpoint: Path | None = None
    # Tokens of a sample in training; None where no run is around the weights.
    sequence_length: int | None = None

    @property
    def is_huggingface(self) -> bool:
        return is_huggingface(self.weights)

    @property
    def step(self) -> int | None:
        """Completed steps of the checkpoint, where its folder's name says so."""
        if self.checkpoint is None or not is_step_folder(self.checkpoint):
            return None
        return step_of(self.checkpoint)

    @property
    def run(self) -> Path | None:
        """The run whose checkpoint it is; None where the checkpoint lies in no run's directory."""
        if self.checkpoint is None or self.checkpoint.parent.name != "checkpoints":
            return None
        return self.checkpoint.parent.parent


def locate(reference: str | Path) -> Located:
    """Find the weights that `reference` means, in the grammar above.

    A checkpoint's tokenizer is the run's; else it is looked for beside the weights. Of a path that exists, an @ is a
    part. Raises WeightsError when there is no such thing, with the steps that a run has; also for a checkpoint that is
    not complete.
    """
    path = Path(reference).absolute()
    if not path.exists() and "@" in os.fspath(reference):
        run, _, step = os.fspath(reference).rpartition("@")
        return _at_step(Path(run).absolute(), step)
    if (path / MODEL_JSON).is_file():
        if path.parent.name.startswith("step-"):
            return locate(path.parent)
        return Located(path, _tokenizer(path))
    if path.name.startswith("step-") or (path / "weights").is_dir():
        return _of_checkpoint(path)
    if complete := complete_checkpoints(path / "checkpoints"):
        return _of_checkpoint(complete[-1])
    if steps := step_folders(path / "checkpoints"):
        raise WeightsError(f"{path} has no complete checkpoint among {len(steps)} in {path / 'checkpoints'}")
    if not path.is_dir():
        raise WeightsError(f"{path} does not exist; name {GRAMMAR}")
    if is_huggingface(path):
        has_tokenizer = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        return Located(path, path if has_tokenizer else None)
    raise WeightsError(f"{path} is nothing with weights; name {GRAMMAR}")


def _at_step(run: Path, step: str) -> Located:
    if not step.isdecimal():
        raise WeightsError(f"{run}@{step}: a whole number of completed steps is wanted behind the @, as in {run}@1000")
    if not run.is_dir():
        raise WeightsError(f"{run} does not exist; name the directory of a run before the @")
    return _of_checkpoint(step_folder(run / "checkpoints", int(step)))


def _of_checkpoint(folder: Path) -> Located:
    if (folder / COMPLETE).is_file():
        _refuse_later_format(folder)
        run = folder.parent.parent
        return Located(folder / "weights", _tokenizer(run), folder, _sequence_length(run))
    if folder.exists():
        raise WeightsError(f"{folder} is no complete checkpoint: it has no {COMPLETE}, its writing was interrupted")
    steps = [str(step_of(path)) for path in complete_checkpoints(folder.parent)]
    has = f"the complete ones there are of the steps {', '.join(steps)}" if steps else "there is no complete one"
    raise WeightsError(f"{folder} does not exist; {has}")


def _refuse_later_format(folder: Path) -> None:
    try:
        read_marker(folder)
    except LaterMarkerError as error:
        raise WeightsError(str(error)) from None
    except MarkerError:
        # What else may be wrong with it is no concern of who reads the weights alone.
        return


def is_huggingface(path: Path) -> bool:
    """Whether `path` is a model directory of transformers."""
    return (path / HUGGINGFACE_CONFIG).is_file() and not (path / MODEL_JSON).is_file()


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` completed steps lies; `root`: the folder "checkpoints" of a run."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The number of completed steps that a folder of `step_folder` is named after."""
    return int(folder.name.removeprefix("step-"))


def is_step_folder(path: Path) -> bool:
    """Whether `step_folder` may have named it; what else a user keeps beside checkpoints is no run's to touch."""
    return re.fullmatch(r"step-\d{8,}", path.name) is not None and path.is_dir()


def step_folders(root: Path) -> list[Path]:
    """Checkpoints under `root`, complete or not, oldest first."""
    return sorted(filter(is_step_folder, root.glob("step-*")), key=lambda path: (step_of(path), path.name))


def complete_checkpoints(root: Path) -> list[Path]:
    """Checkpoints under `root` that carry the marker, oldest first."""
    return [path for path in step_folders(root) if is_marked(path)]


def _tokenizer(directory: Path) -> Path | None:
    return directory / "tokenizer" if (directory / "tokenizer").is_dir() else None


def _sequence_length(run: Path) -> int | None:
    path, configuration = run / "config.yaml", None
    # Nothing else is taken from it: weights are read without.
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        configuration = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    training = configuration.get("training") if isinstance(configuration, dict) else None
    length = training.get("sequence_length") if isinstance(training, dict) else None
    return length if isinstance(length, int) else None
