"""One run from its configuration to its end: plan, world, folder, resume, trainer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from conf import ConfigError
from data_pipeline.corpus import Corpus
from data_pipeline.errors import DataError
from data_pipeline.stream import SampleStream
from model.weights import WeightsError
from train.callbacks.base import Callback
from train.callbacks.checkpointing import Checkpointing
from train.callbacks.evaluation import Evaluation
from train.callbacks.metrics_file import MetricsFile
from train.callbacks.preemption import Preemption
from train.callbacks.progress import Progress
from train.callbacks.stability import Stability
from train.callbacks.wandb_logger import WandbLogger
from train.checkpoint import CheckpointError, RunState, load, newest_usable, remove_torn
from train.config import RunConfig
from train.engine import Engine, World, join_world, seed_everything
from train.evaluate import open_evaluation_corpora
from train.plan import Plan, make_plan
from train.run_directory import (
    EventLog,
    RunDirectory,
    RunLock,
    code_revision,
    environment_description,
    write_atomically,
)
from train.trainer import RunError, Trainer
from train.validate import validate

# A run resumed with another value of one of these would not be the same run.
_FIXED = ("name", "seed", "model", "corpus.directory", "corpus.split", "corpus.weights", "training.sequence_length")


def train(config: RunConfig) -> int:
    """Run or resume; returns the process's exit code: 0 complete or stopped on request, 1 failed.

    Raises ConfigError for a configuration that cannot work.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    problems = validate(config, world_size)
    if problems:
        raise ConfigError(problems)
    plan = make_plan(config, world_size)
    directory = RunDirectory(Path(config.run_root) / config.name)
    world = None
    try:
        corpus = Corpus.open(config.corpus.directory)
        evaluation_corpora = open_evaluation_corpora(config, corpus)
        _check_corpus(config, plan, corpus)
        world = join_world(config)
        _check_same_on_all_ranks(config)
        return _train(config, plan, world, directory, corpus, evaluation_corpora)
    except (DataError, CheckpointError, WeightsError, RunError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        print(f"train: rank {os.environ.get('RANK', 0)}: {error}", file=sys.stderr, flush=True)
        if world is not None:
            EventLog(directory.events, world.is_main).append("error", message=str(error))
        # Peers may wait in a collective that this rank will not join; the launcher ends them.
        os._exit(1) if world_size > 1 else None
        return 1


def _train(
    config: RunConfig,
    plan: Plan,
    world: World,
    directory: RunDirectory,
    corpus: Corpus,
    evaluation_corpora: dict[str, Corpus],
) -> int:
    lock = None
    if world.is_main:
        directory.create()
        lock = RunLock(directory.lock)
        _prepare_folder(config, plan, directory, corpus)
    dist.barrier()
    _log_to_file(directory.logs / f"rank-{world.rank:05d}.log")
    events = EventLog(directory.events, world.is_main)
    stream = SampleStream(
        corpus, config.corpus.split, config.training.sequence_length, config.seed, config.corpus.weights
    )
    identity = {"corpus": corpus.fingerprint, "order": stream.fingerprint}
    checkpoint = newest_usable(
        directory.checkpoints, lambda folder, problem: events.append("reject", checkpoint=folder.name, problem=problem)
    )
    if checkpoint is not None and _completed_steps(checkpoint) >= config.total_steps:
        _say(world, f"The run '{config.name}' is complete: {config.total_steps} steps in {directory.path}.")
        return 0

    seed_everything(config.seed, world.rank)
    engine = Engine(config, plan, world)
    if world.is_main:
        write_atomically(directory.deepspeed, json.dumps(engine.deepspeed_config, indent=1))
    if checkpoint is None:
        engine.initialise()
        state = RunState(data_identity=identity)
        events.append("start", world_size=world.size, steps=config.total_steps)
    else:
        state = load(checkpoint, engine)
        _check_data_identity(state.data_identity, identity, checkpoint)
        _report_resume(config, world, events, checkpoint, state)

    trainer = Trainer(
        config, plan, engine, stream, evaluation_corpora, directory, events, make_callbacks(config), state
    )
    outcome = trainer.run()
    events.append(outcome if outcome == "complete" else "stop", step=trainer.step, reason=trainer.stop_reason)
    if outcome == "stopped":
        _say(world, f"Stopped by {trainer.stop_reason} after step {trainer.step}; the same command resumes.")
    engine.close()
    dist.destroy_process_group()
    if lock is not None:
        lock.release()
    return 0


def make_callbacks(config: RunConfig) -> list[Callback]:
    """Every concern of a run beside the training step, in the order in which its hooks run."""
    callbacks: list[Callback] = [Stability(), MetricsFile(), WandbLogger()]
    if config.logging.progress:
        callbacks.append(Progress())
    return [*callbacks, Preemption(), Evaluation(), Checkpointing()]


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, file=sys.stderr, flush=True)


def _check_corpus(config: RunConfig, plan: Plan, corpus: Corpus) -> None:
    """Raises ConfigError when the corpus does not fit the model or the length of the run."""
    problems = []
    if corpus.vocab_size > config.model.vocab_size:
        problems.append(
            f"model.vocab_size: {config.model.vocab_size} is less than the {corpus.vocab_size} token ids of the tokenizer "
            f"in {config.corpus.directory}; use model.vocab_size={-(-corpus.vocab_size // 64) * 64}"
        )
    splits = corpus.splits
    if config.corpus.split not in splits:
        problems.append(
            f"corpus.split: no split '{config.corpus.split}' in {config.corpus.directory}; it has {', '.join(splits)}"
        )
    sources = corpus.sources(config.corpus.split) if config.corpus.split in splits else []
    for source in config.corpus.weights or {}:
        if source not in sources:
            problems.append(
                f"corpus.weights.{source}: split '{config.corpus.split}' has no such source; it has {', '.join(sources)}"
            )
    for name, evaluation_set in config.evaluation.sets.items():
        own = evaluation_set.directory is None
        if own and evaluation_set.split not in splits:
            problems.append(
                f"evaluation.sets.{name}.split: no split '{evaluation_set.split}' in {config.corpus.directory}; it has "
                f"{', '.join(splits)}"
            )
    if problems:
        raise ConfigError(problems)
    stream = SampleStream(
        corpus, config.corpus.split, config.training.sequence_length, config.seed, config.corpus.weights
    )
    samples = plan.total_steps * plan.global_batch_size
    epochs = stream.mixture.epochs(samples)
    for source, count in epochs.items():
        if count > config.corpus.max_epochs:
            problems.append(
                f"corpus.max_epochs: the run reads source '{source}' {count:.2f} times, more than {config.corpus.max_epochs}; "
                "shorten training.total_tokens, prepare more data, or raise corpus.max_epochs"
            )
    if problems:
        raise ConfigError(problems)


def _check_same_on_all_ranks(config: RunConfig) -> None:
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
        raise RunError(f"ranks {odd} were started with another configuration than rank 0; start all with one command")


def _prepare_folder(config: RunConfig, plan: Plan, directory: RunDirectory, corpus: Corpus) -> None:
    """Everything in the run's folder that is known before the first step. Rank 0 only."""
    if directory.config.exists():
        _check_same_run(config, directory)
    remove_torn(directory.checkpoints)
    _check_room(plan, directory)
    write_atomically(directory.config, OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_atomically(directory.plan, json.dumps(plan.as_dict(), indent=1))
    repository = Path(__file__).resolve().parents[1]
    write_atomically(directory.code, json.dumps(code_revision(repository), indent=1))
    write_atomically(directory.environment, json.dumps(environment_description(), indent=1))
    if not directory.tokenizer.exists():
        corpus.tokenizer().save_to(directory.tokenizer)
    print(plan.describe(), file=sys.stderr, flush=True)


def _check_same_run(config: RunConfig, directory: RunDirectory) -> None:
    """Raises ConfigError when the folder holds a run that differs in what must not change."""
    before = OmegaConf.to_container(OmegaConf.load(directory.config))
    now = dataclasses.asdict(config)
    problems = []
    for key in _FIXED:
        old, new = before, now
        for part in key.split("."):
            old, new = (old or {}).get(part), new[part]
        if old != new:
            problems.append(
                f"{key}: {directory.path} was started with another value; give the run another name=..., or go back to "
                f"{_difference(old, new)}"
            )
    if problems:
        raise ConfigError(problems)


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [f"{key}={old.get(key)!r}" for key in {**old, **new} if old.get(key) != new.get(key)]
        return ", ".join(parts)
    return repr(old)


def _check_room(plan: Plan, directory: RunDirectory) -> None:
    free = shutil.disk_usage(directory.path).free
    if free < plan.checkpoint_bytes:
        raise RunError(
            f"{directory.path} has {free / 2**30:.2f} GiB free, one checkpoint needs {plan.checkpoint_bytes / 2**30:.2f} GiB; "
            "make room or set run_root to another disk"
        )


def _completed_steps(checkpoint: Path) -> int:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["step"]


def _check_data_identity(saved: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    differing = sorted(key for key in {**saved, **now} if saved.get(key) != now.get(key))
    if differing:
        lines = ", ".join(f"{key}: {saved.get(key)} then, {now.get(key)} now" for key in differing)
        raise RunError(f"{checkpoint} was trained on other data ({lines}); its position means nothing here")


def _report_resume(config: RunConfig, world: World, events: EventLog, checkpoint: Path, state: RunState) -> None:
    events.append(
        "resume",
        checkpoint=checkpoint.name,
        step=state.step,
        tokens=state.tokens,
        next_sample=state.next_sample,
        world_size=world.size,
        saved_by_world_size=state.world_size,
        zero_stage=config.parallel.zero_stage,
        saved_by_zero_stage=state.zero_stage,
    )
    _say(
        world,
        f"Resuming '{config.name}' from {checkpoint.name}: {state.step} of {config.total_steps} steps, "
        f"{state.tokens:,} tokens, next sample {state.next_sample:,}.",
    )


def _log_to_file(path: Path) -> None:
    """Everything that Python code logs on this rank goes to its file; of DeepSpeed's, the terminal keeps errors only."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logger = logging.getLogger("DeepSpeed")
    for existing in logger.handlers:
        existing.setLevel(logging.ERROR)
    logger.addHandler(handler)
