"""What a run needs, opened and found fit: its corpus, held-out sets, the folder of an earlier start. Or why it cannot
start.

Reads only (the plan of packing=best_fit and the cache of a remote corpus apart), and needs no process group: each rank
calls it before the ranks meet, `launch local` before they exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from conf import ConfigError
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import DataError, ReadingError
from data_pipeline.reading.live import LiveCorpus, LiveStream
from data_pipeline.reading.stream import SampleStream
from kernels.backend_choice import triton_runs_on
from model.config import ModelConfig
from model.stored import what_is_computed, with_current_keys
from train.config import RunConfig
from train.data import data_identity, misfits_of_mixture, open_run_corpus, open_stream, too_little_data
from train.errors import UnfitDataError
from train.evaluate import open_evaluation_corpora
from train.origin import (
    Origin,
    changes_of_origin,
    misfits_of_data,
    misfits_of_position,
    misfits_of_tokenizer,
    open_origin,
)
from train.plan import Plan, make_plan
from train.run_directory import RunDirectory
from train.validate import validate
from train.wandb_settings import wandb_variable_problems

# A run resumed with another value of one of these would not be the same run.
_FIXED = ("seed", "model", "training.sequence_length")
# Of these, unless corpus.allow_changed_data gives a reason.
_FIXED_DATA = tuple(
    f"corpus.{key}"
    for key in (
        "directory",
        "split",
        "weights",
        "temperature",
        "epoch_caps",
        "phases",
        "packing",
        "window_shards",
        "live",
    )
)


@dataclass(frozen=True)
class Requirements:
    """What a run needs, opened and found fit for it."""

    plan: Plan
    directory: RunDirectory
    corpus: Corpus | LiveCorpus
    evaluation_corpora: dict[str, Corpus]
    stream: SampleStream | LiveStream
    # What the run begins with; None: its seed, or it has begun.
    origin: Origin | None


def open_requirements(config: RunConfig, world_size: int, corpus_check: str = "size") -> Requirements:
    """Check `config` on `world_size` processes against the files that it names.

    `corpus_check`: how far shards are compared with the manifest (`Corpus.open`). Raises ConfigError with every problem
    of the configuration, a corpus that is missing or cannot be used among them; ReadingError where the machine fails.
    """
    _refuse([*validate(config, world_size), *wandb_variable_problems(config.logging.wandb, os.environ)])
    plan = make_plan(config, world_size)
    directory = RunDirectory(Path(config.run_root) / config.name)
    with _data_as_configured():
        corpus = open_run_corpus(config, corpus_check)
        evaluation_corpora = open_evaluation_corpora(config, corpus, corpus_check)
    origin, misfits_of_origin = open_origin(config, directory)
    _refuse(
        [
            *_misfits_of_backends(config),
            *changes_of_run(config, directory),
            *misfits_of_origin,
            *misfits_of_position(origin, config),
            *misfits_of_tokenizer(origin, corpus),
            *_misfits_of_corpus(config, corpus),
            *_misfits_of_evaluation(config, evaluation_corpora),
        ]
    )
    with _data_as_configured("corpus."):
        stream = open_stream(config, corpus, pin=torch.cuda.is_available())
    _refuse([*too_little_data(config, plan, stream), *misfits_of_data(origin, config, data_identity(stream))])
    return Requirements(plan, directory, corpus, evaluation_corpora, stream, origin)


@contextlib.contextmanager
def _data_as_configured(prefix: str = "") -> Iterator[None]:
    """A corpus that is missing, incomplete or unfit is a problem of the configuration that names it.

    Raises ConfigError; `prefix`: what a ValueError leaves out of its key. Not for a ReadingError: the machine fails.
    """
    try:
        yield
    except ReadingError:
        raise
    except DataError as error:
        raise UnfitDataError([str(error)]) from None
    except ValueError as error:
        raise ConfigError([f"{prefix}{error}"]) from None


def _misfits_of_backends(config: RunConfig) -> list[str]:
    """Layers that are to run Triton kernels on a machine that cannot."""
    if triton_runs_on(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")):
        return []
    return [
        f"model.{section}.backend: 'triton' needs a CUDA device and the package triton, and this machine does not have "
        "both; use auto or reference"
        for section in ("mlstm", "preup_mlstm", "slstm")
        if (layer := getattr(config.model, section)) is not None and layer.backend == "triton"
    ]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


def _misfits_of_corpus(config: RunConfig, corpus: Corpus | LiveCorpus) -> list[str]:
    problems = []
    if corpus.vocab_size > config.model.vocab_size:
        problems.append(
            f"model.vocab_size: {config.model.vocab_size} is less than the {corpus.vocab_size} token ids of the "
            f"tokenizer in {corpus.directory}; use model.vocab_size={-(-corpus.vocab_size // 64) * 64}"
        )
    split = config.corpus.split
    if split not in corpus.splits:
        return [*problems, _no_such_split("corpus.split", split, corpus)]
    return problems + misfits_of_mixture(config, corpus)


def _misfits_of_evaluation(config: RunConfig, evaluation_corpora: dict[str, Corpus]) -> list[str]:
    problems = []
    for name, evaluation_set in config.evaluation.sets.items():
        key, held_out = f"evaluation.sets.{name}", evaluation_corpora[name]
        if evaluation_set.split not in held_out.splits:
            problems.append(_no_such_split(f"{key}.split", evaluation_set.split, held_out))
        elif evaluation_set.source not in (None, *(sources := held_out.sources(evaluation_set.split))):
            problems.append(
                f"{key}.source: split '{evaluation_set.split}' has no source '{evaluation_set.source}'; it has "
                f"{', '.join(sources)}"
            )
    return problems


def _no_such_split(key: str, split: str, corpus: Corpus | LiveCorpus) -> str:
    return f"{key}: no split '{split}' in {corpus.directory}; it has {', '.join(corpus.splits)}"


def changes_of_run(config: RunConfig, directory: RunDirectory) -> list[str]:
    """Where the folder holds a run that differs in what must not change."""
    if not directory.config.exists():
        return []
    stored: Any = OmegaConf.to_container(OmegaConf.load(directory.config))
    model = _with_defaults(ModelConfig, with_current_keys(stored.get("model") or {}))
    before: dict[str, Any] = {**_with_defaults(RunConfig, stored), "model": what_is_computed(model)}
    now = dataclasses.asdict(config)
    now["model"] = what_is_computed(now["model"])
    problems = changes_of_origin(config, before, directory)
    if before["name"] != config.name:
        original = directory.path.with_name(str(before["name"]))
        problems.append(
            f"name: {directory.path} holds the run '{before['name']}', copied or renamed. To try something from one of "
            f"its steps, remove the copy and start a branch: name={config.name} resume_from={original}@STEP; to go on "
            f"with it, call the folder {original} again"
        )
    for key in (*_FIXED, *(() if config.corpus.allow_changed_data else _FIXED_DATA)):
        old: Any = before
        new: Any = now
        for part in key.split("."):
            old, new = (old or {}).get(part), new[part]
        if old != new:
            problems.append(
                f"{key}: {directory.path} was started with another value; give the run another name=..., or go back "
                f"to {_difference(old, new)}"
            )
    return problems


def _with_defaults(annotation: Any, value: Any) -> Any:
    """`value` of a field of type `annotation`, with the default of every key that the sections in it lack.

    The folder of a run that an earlier version of this program started has none of the keys that came since.
    """
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is list and isinstance(value, list):
        return [_with_defaults(inner[0], item) for item in value]
    if typing.get_origin(annotation) is dict and isinstance(value, dict):
        return {key: _with_defaults(inner[1], item) for key, item in value.items()}
    # X or X | None.
    for schema in (annotation, *inner):
        if isinstance(schema, type) and dataclasses.is_dataclass(schema) and isinstance(value, dict):
            return _section_with_defaults(schema, value)
    return value


def _section_with_defaults(schema: type, values: dict[str, Any]) -> dict[str, Any]:
    hints, filled = typing.get_type_hints(schema), dict(values)
    for field in dataclasses.fields(schema):
        if field.name not in filled and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            is_section = dataclasses.is_dataclass(default) and not isinstance(default, type)
            filled[field.name] = dataclasses.asdict(default) if is_section else default
        elif field.name not in filled and field.default is not dataclasses.MISSING:
            filled[field.name] = field.default
        if field.name in filled:
            filled[field.name] = _with_defaults(hints[field.name], filled[field.name])
    return filled


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [f"{key}={old.get(key)!r}" for key in {**old, **new} if old.get(key) != new.get(key)]
        return ", ".join(parts)
    return repr(old)
