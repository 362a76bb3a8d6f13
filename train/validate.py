"""Every reason why a run cannot work as configured, found before any work starts. Pure: no file, no GPU, no network."""

from __future__ import annotations

import math

from model.blocks import ACTIVATION_CHECKPOINTING
from model.config import validate_model
from train.config import RunConfig
from train.data import validate_corpus
from train.optimizer import validate_optimizer
from train.parallel.mesh import MeshShape
from train.schedule import validate_schedule

PRECISIONS = ("bf16", "fp32")
WANDB_MODES = ("auto", "offline", "online", "disabled")


def validate(config: RunConfig, world_size: int) -> list[str]:
    """All problems of `config` on `world_size` processes, one line each: key path, value, what to change."""
    problems = [
        *validate_model(config.model, "model"),
        *_validate_training(config, world_size),
        *validate_optimizer(config.optimizer, "optimizer"),
        *validate_corpus(config.corpus),
        *_validate_parallel(config),
        *_validate_intervals(config),
    ]
    if _length_is_known(config):
        problems += validate_schedule(config.schedule, config.total_steps, "schedule")
    if not config.name.strip():
        problems.append("name: empty, so the run's folder would be run_root itself; give the run a name")
    if config.logging.wandb.mode not in WANDB_MODES:
        problems.append(_choice("logging.wandb.mode", config.logging.wandb.mode, WANDB_MODES))
    return problems


def _choice(key: str, value: object, choices: tuple) -> str:
    return f"{key}: no such choice ({value!r}); choose one of {', '.join(map(str, choices))}"


def _length_is_known(config: RunConfig) -> bool:
    training = config.training
    given = [n for n in (training.total_steps, training.total_tokens) if n is not None]
    return len(given) == 1 and given[0] > 0 and config.tokens_per_step > 0


def _validate_training(config: RunConfig, world_size: int) -> list[str]:
    training = config.training
    problems = [
        f"training.{key}: must be at least 1 ({getattr(training, key)})"
        for key in ("sequence_length", "global_batch_size", "micro_batch_size")
        if getattr(training, key) < 1
    ]
    if (training.total_steps is None) == (training.total_tokens is None):
        problems.append(
            f"training.total_steps: set exactly one of total_steps ({training.total_steps}) and total_tokens "
            f"({training.total_tokens}), the other to null"
        )
    for key in ("total_steps", "total_tokens"):
        value = getattr(training, key)
        if value is not None and value < 1:
            problems.append(f"training.{key}: must be at least 1 ({value})")
    if not 0 <= training.z_loss_weight < math.inf:
        problems.append(f"training.z_loss_weight: must be 0 (no z-loss) or positive ({training.z_loss_weight})")
    if training.max_skipped_steps < 0:
        problems.append(f"training.max_skipped_steps: cannot be negative ({training.max_skipped_steps})")
    if training.cpu_threads is not None and training.cpu_threads < 1:
        problems.append(f"training.cpu_threads: must be at least 1 or null ({training.cpu_threads})")
    replicas = MeshShape.of_world(world_size).data
    per_pass = training.micro_batch_size * replicas
    if not problems and training.global_batch_size % per_pass:
        fitting = [size for size in range(1, training.micro_batch_size + 1)
                   if training.global_batch_size % (size * replicas) == 0]  # fmt: skip
        nearest = max(per_pass, round(training.global_batch_size / per_pass) * per_pass)
        advice = f"or training.micro_batch_size={max(fitting)}" if fitting else "or another number of processes"
        problems.append(
            f"training.global_batch_size: {training.global_batch_size} samples do not divide into passes of "
            f"{training.micro_batch_size} (training.micro_batch_size) on {world_size} processes; use "
            f"training.global_batch_size={nearest} {advice}"
        )
    return problems


def _validate_parallel(config: RunConfig) -> list[str]:
    problems = []
    parallel = config.parallel
    if parallel.zero_stage not in (0, 1, 2, 3):
        problems.append(_choice("parallel.zero_stage", parallel.zero_stage, (0, 1, 2, 3)))
    if parallel.activation_checkpointing not in ACTIVATION_CHECKPOINTING:
        problems.append(
            _choice("parallel.activation_checkpointing", parallel.activation_checkpointing, ACTIVATION_CHECKPOINTING)
        )
    if parallel.collective_timeout_seconds < 1:
        problems.append(
            f"parallel.collective_timeout_seconds: must be at least 1 ({parallel.collective_timeout_seconds})"
        )
    if config.precision.compute not in PRECISIONS:
        problems.append(_choice("precision.compute", config.precision.compute, PRECISIONS))
    return problems


def _validate_intervals(config: RunConfig) -> list[str]:
    at_least = {
        "checkpoint.interval": (config.checkpoint.interval, 0),
        "checkpoint.keep_last": (config.checkpoint.keep_last, 1),
        "evaluation.interval": (config.evaluation.interval, 0),
        "evaluation.batch_size": (config.evaluation.batch_size, 1),
        "logging.interval": (config.logging.interval, 1),
        "logging.monitor_interval": (config.logging.monitor_interval, 0),
    }
    problems = []
    if config.checkpoint.keep_every is not None:
        at_least["checkpoint.keep_every"] = (config.checkpoint.keep_every, 1)
    for name, evaluation_set in config.evaluation.sets.items():
        if evaluation_set.max_tokens is not None:
            at_least[f"evaluation.sets.{name}.max_tokens"] = (evaluation_set.max_tokens, 1)
        if config.corpus.live is not None and evaluation_set.directory is None:
            problems.append(
                f"evaluation.sets.{name}.directory: a run that tokenizes while it reads holds nothing out; name a "
                "prepared corpus, or set evaluation=none"
            )
        if evaluation_set.by_source and evaluation_set.source is not None:
            problems.append(
                f"evaluation.sets.{name}.by_source: the set is one source already ({evaluation_set.source}); set "
                "by_source=false or source=null"
            )
    problems += [f"{key}: must be at least {low} ({value})" for key, (value, low) in at_least.items() if value < low]
    if not config.logging.spike_factor > 1:
        problems.append(f"logging.spike_factor: must be above 1 ({config.logging.spike_factor})")
    return problems
