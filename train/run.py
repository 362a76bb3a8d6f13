"""One run from its configuration to its end: plan, world, folder, resume, trainer."""

from __future__ import annotations

import contextlib
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
from data_pipeline.errors import DataError
from data_pipeline.tokenizer import SIDECAR
from model.weights import WeightsError
from train.callbacks.base import Callback
from train.callbacks.checkpointing import Checkpointing
from train.callbacks.evaluation import Evaluation
from train.callbacks.metrics_file import MetricsFile
from train.callbacks.preemption import Preemption
from train.callbacks.progress import Progress
from train.callbacks.stability import Stability
from train.callbacks.wandb_logger import WandbLogger
from train.checkpoints.writer import CheckpointError, RunState, load, newest_usable, read_state, remove_torn
from train.config import RunConfig
from train.data import changes_of_data, data_identity, describe_data, refuse_changed_data
from train.evaluate import open_sets
from train.kernel_check import check_kernels
from train.parallel.zero import Engine, World, join_world, seed_everything
from train.plan import Plan, gib
from train.requirements import Preflight, preflight
from train.run_directory import (
    EventLog,
    RunDirectory,
    RunLock,
    code_revision,
    environment_description,
    write_atomically,
)
from train.trainer import RunError, Trainer


def train(config: RunConfig) -> int:
    """Run or resume; returns the process's exit code: 0 complete or stopped on request, 1 failed.

    Raises ConfigError for a configuration that cannot work.
    """
    # Without a rank this is the only process (`join_world`), whatever a cluster has set.
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    world = None
    try:
        # Before the ranks meet: each finds the same problems, and none waits for another that has ended.
        # One look at every shard's file is enough; each rank checks what it reads.
        corpus_check = "size" if int(os.environ.get("RANK", 0)) == 0 else "none"
        checked = preflight(config, world_size, corpus_check)
        world = join_world(config)
        if world.is_main:
            checked.directory.create()
        _check_same_on_all_ranks(config, data_identity(checked.stream))
        return _train(config, world, checked)
    except (DataError, CheckpointError, WeightsError, RunError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        print(f"train: rank {os.environ.get('RANK', 0)}: {error}", file=sys.stderr, flush=True)
        if world is not None:
            # The folder may be what is wrong: not there, not writable, full.
            with contextlib.suppress(OSError):
                EventLog(checked.directory.events, world.is_main).append("error", message=str(error))
        # Peers may wait in a collective that this rank will not join; the launcher ends them.
        os._exit(1) if world_size > 1 else None
        return 1


def _train(config: RunConfig, world: World, checked: Preflight) -> int:
    plan, directory = checked.plan, checked.directory
    lock = None
    if world.is_main:
        lock = RunLock(directory.lock)
        _prepare_folder(config, checked)
    dist.barrier()
    _log_to_file(directory.logs / f"rank-{world.rank:05d}.log")
    events = EventLog(directory.events, world.is_main)
    identity = data_identity(checked.stream)
    checkpoint = newest_usable(
        directory.checkpoints, lambda folder, problem: events.append("reject", checkpoint=folder.name, problem=problem)
    )
    if checkpoint is not None and read_state(checkpoint).step >= config.total_steps:
        _say(world, f"The run '{config.name}' is complete: {config.total_steps} steps in {directory.path}.")
        return 0

    check_kernels(config, world, events)
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
        changes = changes_of_data(state.data_identity, identity)
        if changes and config.corpus.allow_changed_data is None:
            refuse_changed_data(changes, checkpoint)
        _report_resume(config, world, events, checkpoint, state)
        if changes:
            state.data_identity = identity
            events.append("data_changed", step=state.step, reason=config.corpus.allow_changed_data, changes=changes)
    for name, windows in open_sets(config, checked.evaluation_corpora).items():
        events.append("evaluation_set", set=name, fingerprint=windows.fingerprint, tokens=windows.targets)

    trainer = Trainer(
        config,
        plan,
        engine,
        checked.stream,
        checked.evaluation_corpora,
        directory,
        events,
        make_callbacks(config),
        state,
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
    """Every concern of a run beside the training step, in the order in which its hooks run (on_run_end: in reverse)."""
    callbacks: list[Callback] = [Stability(), MetricsFile(), WandbLogger()]
    if config.logging.progress:
        callbacks.append(Progress())
    return [*callbacks, Preemption(), Evaluation(), Checkpointing()]


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, file=sys.stderr, flush=True)


def _check_same_on_all_ranks(config: RunConfig, identity: dict[str, Any]) -> None:
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (digest, identity))
    odd = [rank for rank, (other, _) in enumerate(found) if other != found[0][0]]
    if odd:
        raise RunError(f"ranks {odd} were started with another configuration than rank 0; start all with one command")
    odd = [rank for rank, (_, other) in enumerate(found) if other != found[0][1]]
    if odd:
        keys = ", ".join(changes_of_data(found[0][1], found[odd[0]][1]))
        raise RunError(
            f"ranks {odd} read other data than rank 0 at {config.corpus.directory} (they differ in {keys}); bring the "
            "same corpus to all nodes"
        )


def _prepare_folder(config: RunConfig, checked: Preflight) -> None:
    """Everything in the run's folder that is known before the first step. Rank 0 only."""
    plan, directory = checked.plan, checked.directory
    remove_torn(directory.checkpoints)
    _check_room(plan, directory)
    write_atomically(directory.config, OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_atomically(directory.plan, json.dumps(plan.as_dict(), indent=1))
    repository = Path(__file__).resolve().parents[1]
    write_atomically(directory.code, json.dumps(code_revision(repository), indent=1))
    write_atomically(directory.environment, json.dumps(environment_description(), indent=1))
    # Written last: without it an earlier start was killed while it copied.
    if not (directory.tokenizer / SIDECAR).exists():
        checked.corpus.tokenizer().save_to(directory.tokenizer)
    print(plan.describe(), describe_data(config, plan, checked.stream), sep="\n", file=sys.stderr, flush=True)


def _check_room(plan: Plan, directory: RunDirectory) -> None:
    free = shutil.disk_usage(directory.path).free
    if free < plan.checkpoint_bytes:
        raise RunError(
            f"{directory.path} has {gib(free)} free, one checkpoint needs "
            f"{gib(plan.checkpoint_bytes)}; make room or set run_root to another disk"
        )


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
    """What Python code logs on this rank goes to its file; of DeepSpeed's, the terminal keeps errors only."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logger = logging.getLogger("DeepSpeed")
    for existing in logger.handlers:
        existing.setLevel(logging.ERROR)
    logger.addHandler(handler)
