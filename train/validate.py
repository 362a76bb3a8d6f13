"""Every reason why a run cannot work as configured, found before any work starts. Pure: no file, no GPU, no network."""

from __future__ import annotations

import math

from conf.problems import at_least, choice, exactly_one, local_folder
from model.config import validate_model
from model.generation import sampling_problems
from model.layers import layer_kinds, sequence_problems
from model.recomputation import ACTIVATION_CHECKPOINTING
from train.alert_rules import validate_alerts
from train.checkpoints.state import TrainState
from train.config import PRECISIONS, NumbersConfig, RunConfig, SamplesConfig
from train.data import ON_CORRUPT, validate_corpus, validate_task_of_run
from train.health.config import validate_health
from train.length import schedule_length, taken_over
from train.optimizer import validate_optimizer
from train.origin import validate_origin
from train.parallel.state_exchange import AUTO, EXCHANGES
from train.schedule import validate_schedule
from train.wandb_settings import validate_wandb

ZERO_STAGES = (0, 1, 2, 3)


def validate(config: RunConfig, world_size: int, state: TrainState | None = None) -> list[str]:
    """All problems of `config` on `world_size` processes, one line each: key path, value, what to change.

    `state`: what the run goes on from; None when it begins.
    """
    problems = [
        *validate_model(config.model, "model"),
        *_validate_training(config, world_size),
        *validate_optimizer(config.optimizer, "optimizer"),
        *validate_corpus(config.corpus),
        *validate_task_of_run(config),
        *_validate_parallel(config),
        *_validate_pipeline(config, world_size),
        *_validate_sequence_ranks(config, world_size),
        *_validate_compile(config),
        *_validate_time_chunk(config),
        *_validate_carry_state(config),
        *_validate_intervals(config),
        *_validate_numbers(config.numbers, config.parallel.zero_stage),
        *validate_origin(config),
    ]
    if _length_is_known(config):
        length = config.total_steps if state is None else schedule_length(config, taken_over(config, state))
        problems += validate_schedule(config.schedule, length, "schedule")
    if not config.name.strip():
        problems.append("name: empty, so the run's folder would be run_root itself; give the run a name")
    problems += local_folder("run_root", config.run_root)
    problems += _validate_samples(config.logging.samples)
    problems += validate_alerts(config.alerts, "alerts")
    problems += validate_health(config.health, "health")
    return problems + validate_wandb(config.logging.wandb, "logging.wandb")


def _length_is_known(config: RunConfig) -> bool:
    training = config.training
    given = [n for n in (training.total_steps, training.total_tokens) if n is not None]
    return len(given) == 1 and given[0] > 0 and config.tokens_per_step > 0


def _validate_training(config: RunConfig, world_size: int) -> list[str]:
    training = config.training
    lengths = {"total_steps": training.total_steps, "total_tokens": training.total_tokens}
    problems = [
        problem
        for key in ("sequence_length", "global_batch_size", "micro_batch_size")
        for problem in at_least(f"training.{key}", getattr(training, key), 1)
    ]
    sizes_are_positive = not problems
    problems += exactly_one("training.total_steps", lengths)
    for key, value in lengths.items():
        problems += at_least(f"training.{key}", value, 1)
    if not 0 <= training.z_loss_weight < math.inf:
        problems.append(f"training.z_loss_weight: must be 0 (no z-loss) or positive ({training.z_loss_weight})")
    if training.max_skipped_steps < 0:
        problems.append(f"training.max_skipped_steps: cannot be negative ({training.max_skipped_steps})")
    problems += [
        f"training.skip_samples[{number}]: needs [first sample, at least 0; how many, at least 1] ({window})"
        for number, window in enumerate(training.skip_samples)
        if len(window) != 2 or window[0] < 0 or window[1] < 1
    ]
    if training.cpu_threads is not None and training.cpu_threads < 1:
        problems.append(f"training.cpu_threads: must be at least 1 or null ({training.cpu_threads})")
    per_replica = config.parallel.pipeline * config.parallel.sequence
    # Where the processes do not divide among replicas, that is the problem.
    replicas = world_size // per_replica if per_replica > 0 and world_size % per_replica == 0 else 1
    per_pass = training.micro_batch_size * replicas
    if sizes_are_positive and training.global_batch_size % per_pass:
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
    parallel = config.parallel
    return [
        *choice("parallel.zero_stage", parallel.zero_stage, ZERO_STAGES),
        *choice("parallel.activation_checkpointing", parallel.activation_checkpointing, ACTIVATION_CHECKPOINTING),
        *at_least("parallel.collective_timeout_seconds", parallel.collective_timeout_seconds, 1),
        *choice("precision.compute", config.precision.compute, PRECISIONS),
    ]


def _validate_pipeline(config: RunConfig, world_size: int) -> list[str]:
    parallel, stages, blocks = config.parallel, config.parallel.pipeline, config.model.n_blocks
    if stages <= 1:
        return at_least("parallel.pipeline", stages, 1)
    problems = []
    per_replica = stages * max(1, parallel.sequence)
    if world_size % per_replica:
        each = f" x {parallel.sequence} sequence ranks (parallel.sequence)" if parallel.sequence > 1 else ""
        problems.append(
            f"parallel.pipeline: {world_size} processes do not divide into replicas of {stages} stages{each}; start a "
            f"multiple of {per_replica}, or choose fewer stages"
        )
    if stages > blocks:
        problems.append(
            f"parallel.pipeline: {stages} stages are more than the model's {blocks} blocks (model.n_blocks), of which "
            f"each stage takes at least one; use at most {blocks}"
        )
    if parallel.zero_stage in (2, 3):
        problems.append(
            f"parallel.zero_stage: {parallel.zero_stage} cuts gradients or weights at every micro-batch, which the "
            f"stages of parallel.pipeline={stages} do not take; use parallel.zero_stage=1, or parallel.pipeline=1"
        )
    return problems


def _validate_sequence_ranks(config: RunConfig, world_size: int) -> list[str]:
    ranks, length = config.parallel.sequence, config.training.sequence_length
    problems = choice("parallel.sequence_exchange", config.parallel.sequence_exchange, (AUTO, *EXCHANGES))
    if ranks < 1:
        return problems + at_least("parallel.sequence", ranks, 1)
    if world_size % ranks:
        problems.append(
            f"parallel.sequence: {world_size} processes do not divide into groups of {ranks} that share a sequence; "
            f"start a multiple of {ranks}, or choose a divisor of {world_size}"
        )
    if length > 0 and length % ranks:
        problems.append(
            f"training.sequence_length: {length} tokens do not divide into {ranks} equal slices (parallel.sequence); "
            f"use training.sequence_length={max(1, round(length / ranks)) * ranks}"
        )
    if not validate_model(config.model):
        problems += [f"parallel.sequence: {problem}" for problem in sequence_problems(config.model, ranks, length)]
    return problems


def _validate_compile(config: RunConfig) -> list[str]:
    if not config.training.cuda_graphs:
        return []
    return [
        f"training.cuda_graphs: {reason}, so nothing can be recorded; set training.cuda_graphs=null or change that"
        for reason in config.reasons_not_to_capture()
    ]


def _validate_time_chunk(config: RunConfig) -> list[str]:
    chunk, ranks = config.training.time_chunk, config.parallel.sequence
    problems = at_least("training.time_chunk", chunk, 1)
    if chunk is not None and ranks > 1:
        problems.append(
            f"training.time_chunk: chunks in time ({chunk} tokens) are trained one after another by one rank, and "
            f"parallel.sequence={ranks} ranks share each sample; set training.time_chunk=null or parallel.sequence=1"
        )
    return problems


def _validate_carry_state(config: RunConfig) -> list[str]:
    training, ranks = config.training, config.parallel.sequence
    problems = at_least("training.carry_windows", training.carry_windows, 1)
    if not training.carry_state:
        return problems
    key = "training.carry_state"
    if config.corpus.packing != "concatenate":
        problems.append(
            f"{key}: corpus.packing={config.corpus.packing} puts documents into samples of their own, which do not go "
            "on; set corpus.packing=concatenate"
        )
    if ranks > 1:
        problems.append(
            f"{key}: the state of a row belongs to one rank, and parallel.sequence={ranks} ranks share each row; set "
            "parallel.sequence=1"
        )
    if config.parallel.pipeline > 1:
        problems.append(
            f"{key}: the state of a row belongs to one rank, and parallel.pipeline={config.parallel.pipeline} stages "
            "share each row; set parallel.pipeline=1"
        )
    if not validate_model(config.model):
        growing = [
            k.block for k in dict.fromkeys(layer_kinds(config.model)) if k.state_elements(config.model).cache_per_token
        ]
        problems += [
            f"{key}: {block} blocks carry all earlier tokens, more with every step; train without them, or with "
            "training.carry_state=false"
            for block in growing
        ]
    if problems:
        return problems
    windows = training.carry_windows
    for number, phase in enumerate(config.corpus.phases):
        name, start, multiple = "from_step", phase.from_step, windows
        if start is None:
            name, start, multiple = "from_sample", phase.from_sample, windows * max(1, training.global_batch_size)
        if start is not None and start % multiple:
            problems.append(
                f"corpus.phases[{number}].{name}: rows go on for training.carry_windows={windows} steps, so a mixture "
                f"changes at a multiple of {multiple} only ({start}); use {max(1, round(start / multiple)) * multiple}"
            )
    return problems


def _validate_samples(samples: SamplesConfig) -> list[str]:
    problems = at_least("logging.samples.interval", samples.interval, 0)
    if samples.interval and not samples.prompts:
        problems.append('logging.samples.prompts: there is none; give a text, or [""] to begin a document')
    settings = sampling_problems(samples.max_new_tokens, samples.temperature, samples.top_k, samples.top_p)
    return problems + [f"logging.samples.{problem.replace(' ', ': ', 1)}" for problem in settings]


def validate_evaluation(config: RunConfig) -> list[str]:
    """The problems of the keys under `evaluation`, one line each. Pure."""
    problems = [
        *at_least("evaluation.interval", config.evaluation.interval, 0),
        *at_least("evaluation.batch_size", config.evaluation.batch_size, 1),
    ]
    for name, evaluation_set in config.evaluation.sets.items():
        problems += at_least(f"evaluation.sets.{name}.max_tokens", evaluation_set.max_tokens, 1)
        if config.corpus.live is not None and evaluation_set.directory is None:
            problems.append(
                f"evaluation.sets.{name}.directory: a run that tokenizes while it reads holds nothing out; name a "
                "prepared corpus, or set evaluation=none"
            )
        if config.corpus.task is not None:
            problems.append(
                f"evaluation.sets.{name}: held-out text says nothing of a task; set evaluation=none, and score the "
                "model by a suite when it is trained: python -m train.evaluate RUN suite=task"
            )
        if evaluation_set.by_source and evaluation_set.source is not None:
            problems.append(
                f"evaluation.sets.{name}.by_source: the set is one source already ({evaluation_set.source}); set "
                "by_source=false or source=null"
            )
    return problems


def _validate_keep_best(config: RunConfig) -> list[str]:
    name, sets = config.checkpoint.keep_best, config.evaluation.sets
    if name is None or name.partition("/")[0] in sets:
        return []
    known = f"choose one of {', '.join(sets)}" if sets else "the run has none; see evaluation.sets"
    return [f"checkpoint.keep_best: no such held-out set ({name}); {known}"]


def _validate_mirror(config: RunConfig) -> list[str]:
    place, seconds = config.checkpoint.mirror, config.checkpoint.mirror_seconds
    problems = at_least("checkpoint.mirror_seconds", seconds, 0)
    timeout = config.parallel.collective_timeout_seconds
    if seconds >= timeout:
        problems.append(
            f"checkpoint.mirror_seconds: must be below parallel.collective_timeout_seconds={timeout}, for which the "
            f"other processes wait ({seconds:g})"
        )
    if place is not None and not place.strip():
        problems.append("checkpoint.mirror: empty; name a folder or a URL, or set it to null")
    return problems


def _validate_intervals(config: RunConfig) -> list[str]:
    problems = [
        *(problem for step in config.checkpoint.keep_at for problem in at_least("checkpoint.keep_at", step, 1)),
        *at_least("checkpoint.interval", config.checkpoint.interval, 0),
        *at_least("checkpoint.keep_last", config.checkpoint.keep_last, 1),
        *at_least("checkpoint.max_failed_saves", config.checkpoint.max_failed_saves, 0),
        *at_least("checkpoint.keep_every", config.checkpoint.keep_every, 1),
        *at_least("checkpoint.mirror_keep_last", config.checkpoint.mirror_keep_last, 1),
        *_validate_mirror(config),
        *choice("checkpoint.on_corrupt", config.checkpoint.on_corrupt, ON_CORRUPT),
        *_validate_keep_best(config),
        *validate_evaluation(config),
        *at_least("logging.interval", config.logging.interval, 1),
        *at_least("logging.monitor_interval", config.logging.monitor_interval, 0),
        *at_least("watchdog.seconds", config.watchdog.seconds, 1),
        *at_least("preemption.seconds_left", config.preemption.seconds_left, 0),
    ]
    if not config.logging.spike_factor > 1:
        problems.append(f"logging.spike_factor: must be above 1 ({config.logging.spike_factor})")
    return problems


def _validate_numbers(numbers: NumbersConfig, zero_stage: int) -> list[str]:
    problems = [
        *at_least("numbers.bad_steps", numbers.bad_steps, 1),
        *at_least("numbers.window", numbers.window, 1),
        *at_least("numbers.max_rollbacks", numbers.max_rollbacks, 0),
        *at_least("numbers.compare_interval", numbers.compare_interval, 0),
    ]
    if not problems and numbers.bad_steps is not None and numbers.bad_steps > numbers.window:
        problems.append(
            f"numbers.bad_steps: {numbers.bad_steps} bad steps are never among the last {numbers.window} "
            "(numbers.window); raise the window, or set numbers.bad_steps=null to never go back"
        )
    if numbers.compare_gradients and zero_stage > 0:
        problems.append(
            f"numbers.compare_gradients: with parallel.zero_stage={zero_stage} each process keeps another part of the "
            "gradients, and there is nothing to compare; set parallel.zero_stage=0 or numbers.compare_gradients=false"
        )
    if numbers.compare_gradients and not numbers.compare_interval:
        problems.append(
            "numbers.compare_gradients: nothing is compared at any step (numbers.compare_interval=0); set an interval"
        )
    return problems
