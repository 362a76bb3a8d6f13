"""What a run needs, opened and found fit: its corpus, held-out sets, the folder of an earlier start. Or why it cannot
start.

Reads only (the plan of packing=best_fit and the cache of a remote corpus apart), and needs no process group: each rank
calls it before the ranks meet, `launch local` before they exist.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from conf import ConfigError
from conf.passwords import has_hidden_password, without_passwords
from data_pipeline.corpus import file_systems
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import DataError, ReadingError
from kernels.backend_choice import triton_runs_on
from train.callbacks.tensorboard_logger import missing_tensorboard
from train.changes import changes_of_order, changes_of_run, refused_changes_of_data
from train.checkpoints.mirror_store import MirrorStore
from train.checkpoints.reader import newest_state
from train.config import RunConfig
from train.data import (
    RunCorpus,
    RunStream,
    data_identity,
    misfits_of_mixture,
    open_run_corpus,
    open_stream,
    too_little_data,
)
from train.errors import UnfitDataError
from train.evaluate import open_evaluation_corpora
from train.later_formats import later_formats
from train.origin import Origin, misfits_of_position, misfits_of_tokenizer, open_origin
from train.plan import Plan, make_plan
from train.run_directory import RunDirectory
from train.validate import validate
from train.wandb_settings import wandb_variable_problems


@dataclass(frozen=True)
class Requirements:
    """What a run needs, opened and found fit for it."""

    plan: Plan
    directory: RunDirectory
    corpus: RunCorpus
    evaluation_corpora: dict[str, Corpus]
    stream: RunStream
    # What the run begins with; None: its seed, or it has begun.
    origin: Origin | None
    # Where its checkpoints are copied to; None: nowhere.
    mirror_store: MirrorStore | None


def open_requirements(
    config: RunConfig, world_size: int, corpus_check: str = "size", computes_here: bool = True
) -> Requirements:
    """Check `config` on `world_size` processes against the files that it names.

    `corpus_check`: how far shards are compared with the manifest (`Corpus.open`). `computes_here`: the run is computed
    on this machine, which must then have what that takes. Raises ConfigError with every problem of the configuration, a
    corpus that is missing or cannot be used among them; ReadingError where the machine fails.
    """
    directory = RunDirectory(Path(config.run_root) / config.name)
    _refuse(later_formats(directory))
    _refuse([*directory.unwritable(), *directory.foreign()])
    # As far as its checkpoint turns out to be whole, which the ranks find out together.
    state = newest_state(directory.checkpoints)
    origin, misfits_of_origin = open_origin(config, directory)
    if state is None and origin is not None:
        state = origin.state
    _refuse(
        [
            *validate(config, world_size, state),
            *wandb_variable_problems(config.logging.wandb, os.environ),
            *(missing_tensorboard() if config.logging.tensorboard else []),
        ]
    )
    mirror_store, misfits_of_mirror = open_mirror(config, directory)
    plan = make_plan(config, world_size, state=state)
    with data_as_configured():
        corpus = open_run_corpus(config, corpus_check)
        evaluation_corpora = open_evaluation_corpora(config, corpus, corpus_check)
    _refuse(
        [
            *([*_misfits_of_backends(config), *_misfits_of_cuda_graphs(config)] if computes_here else []),
            *changes_of_run(config, directory),
            *misfits_of_mirror,
            *misfits_of_origin,
            *misfits_of_position(origin, config),
            *misfits_of_tokenizer(origin, corpus),
            *([] if state is None else changes_of_order(config, state)),
            *_misfits_of_corpus(config, corpus),
            *misfits_of_evaluation(config, evaluation_corpora),
        ]
    )
    with data_as_configured("corpus."):
        stream = open_stream(config, corpus, pin=torch.cuda.is_available())
    changed = [] if state is None else refused_changes_of_data(config, state, data_identity(stream))
    _refuse(changed or too_little_data(config, plan, stream))
    return Requirements(plan, directory, corpus, evaluation_corpora, stream, origin, mirror_store)


@contextlib.contextmanager
def data_as_configured(prefix: str = "") -> Iterator[None]:
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


def _misfits_of_cuda_graphs(config: RunConfig) -> list[str]:
    if not config.training.cuda_graphs or torch.cuda.is_available():
        return []
    return ["training.cuda_graphs: true needs a CUDA device, and this machine has none; set training.cuda_graphs=null"]


def open_mirror(config: RunConfig, directory: RunDirectory) -> tuple[MirrorStore | None, list[str]]:
    """Where the run's checkpoints are copied to, and why they cannot be. Nothing is read or written there."""
    place, key = config.checkpoint.mirror, "checkpoint.mirror"
    if place is None:
        return None, []
    shown = without_passwords(place)
    if has_hidden_password(place):
        return None, [f"{key}: {place}: its password was not kept; name the mirror with it"]
    try:
        store = MirrorStore(place, config.name)
    except (ImportError, ValueError) as error:
        return None, [f"{key}: {shown} cannot be opened ({file_systems.shown(error, place)}); name another place"]
    if store.local_root == os.path.realpath(directory.checkpoints):
        return None, [f"{key}: {shown} is run_root, where the run's checkpoints are themselves; name another place"]
    return store, []


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


def _misfits_of_corpus(config: RunConfig, corpus: RunCorpus) -> list[str]:
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


def misfits_of_evaluation(config: RunConfig, evaluation_corpora: dict[str, Corpus]) -> list[str]:
    """What evaluation sets ask of their corpora that these lack, one line each."""
    problems = []
    for name, evaluation_set in config.evaluation.sets.items():
        key, held_out = f"evaluation.sets.{name}", evaluation_corpora[name]
        if evaluation_set.split not in held_out.splits:
            problem = _no_such_split(f"{key}.split", evaluation_set.split, held_out)
            problems.append(
                f"{problem}; where nothing is held out, train with evaluation=none, or prepare with "
                "data.split.validation_fraction=0.01"
            )
        elif evaluation_set.source not in (None, *(sources := held_out.sources(evaluation_set.split))):
            problems.append(
                f"{key}.source: split '{evaluation_set.split}' has no source '{evaluation_set.source}'; it has "
                f"{', '.join(sources)}"
            )
    return problems


def _no_such_split(key: str, split: str, corpus: RunCorpus) -> str:
    return f"{key}: no split '{split}' in {corpus.directory}; it has {', '.join(corpus.splits)}"
