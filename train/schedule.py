"""Learning-rate schedules as pure functions of the number of optimizer steps applied (`train.length`: or of tokens).

Nothing here has state: a resumed, a repeated and an uninterrupted run ask for the same step and get the same rate.
Published schedules that the kinds express: arXiv 2503.13427 (xLSTM 7B: exponential), arXiv 2405.04517 (xLSTM: cosine),
arXiv 2405.18392 (warm-up, stable, decay; its "1 - sqrt" cooldown).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("cosine", "linear", "wsd", "exponential", "constant")
DECAY_SHAPES = ("linear", "sqrt", "cosine")

# What each kind needs and may have beside `warmup`; every other field must be null.
_REQUIRED = {
    "cosine": ("final_factor",),
    "linear": ("final_factor",),
    "wsd": ("decay", "decay_shape", "final_factor"),
    "exponential": ("decay", "final_factor"),
    "constant": (),
}
_OPTIONAL = {
    "cosine": ("decay", "cooldown"),
    "linear": ("decay",),
    "wsd": (),
    "exponential": ("cooldown",),
    "constant": (),
}


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over a run.

    Durations are optimizer steps when they are whole numbers of at least 1 (`2000`), and a share of the run when they
    are fractions below 1 (`0.01`: the hundredth part, rounded to whole steps). A field that `kind` does not use is
    null. In a run whose length is given in tokens, the schedule is a curve over tokens, and these steps are those of
    the batch that the run had when the schedule was set.
    """

    # cosine | linear | wsd | exponential | constant
    kind: str = "cosine"
    # Linear rise to the peak: the first step has peak / warmup, step number `warmup` the peak.
    warmup: int | float = 0.01
    # cosine, linear: steps from the end of the warm-up to final_factor (null: as many as the run has left before its
    #   cooldown). The run's end cuts off a longer decay, as in the 15B-token runs of arXiv 2405.04517.
    # wsd: the last steps of the run, in which the rate falls.
    # exponential: steps from the end of the warm-up in which the rate falls to final_factor; it goes on falling after.
    decay: int | float | None = None
    # wsd: linear | sqrt (1 - sqrt(x), arXiv 2405.18392) | cosine
    decay_shape: str | None = None
    # The rate at the end of the decay as a share of the peak.
    final_factor: float | None = 0.1
    # cosine, exponential: the last steps of the run, in which the rate falls linearly to 0 from where it stood.
    cooldown: int | float | None = None


def duration_in_steps(duration: int | float | None, total_steps: int) -> int:
    """Whole steps of a duration of `ScheduleConfig` in a run of `total_steps` steps; 0 for null."""
    if duration is None:
        return 0
    return round(duration * total_steps) if duration < 1 else int(duration)


def describe_schedule(config: ScheduleConfig, total_steps: int) -> str:
    """The schedule of a run of `total_steps` steps as a reader's line, durations in steps."""
    parts = [config.kind, f"warm-up {duration_in_steps(config.warmup, total_steps):,} steps"]
    for name, duration in {"decay": config.decay, "cooldown to 0": config.cooldown}.items():
        if duration is not None:
            parts.append(f"{name} {duration_in_steps(duration, total_steps):,} steps")
    if config.final_factor is not None:
        parts.append(f"falls to {config.final_factor:g} of the peak")
    return ", ".join(parts)


def last_phase_begins(config: ScheduleConfig, total_steps: int) -> int | None:
    """The step after which the rate begins to fall for good, by the decay of wsd or a cooldown; None without one."""
    duration = config.decay if config.kind == "wsd" else config.cooldown
    steps = duration_in_steps(duration, total_steps)
    return total_steps - steps if steps else None


def learning_rate(config: ScheduleConfig, peak: float, step: float, total_steps: int) -> float:
    """The learning rate of the step that follows `step` applied optimizer steps (0: the first step of the run).

    `step` is no whole number where a run in tokens takes steps of another size than those that its schedule counts.

    A decay of N steps that begins after step b has progress (step - b) / N: the first step after the warm-up still has
    the peak, and the value "at the end" is that of step b + N, so that no step of a decay to 0 is wasted on a rate of
    0. Steps from `total_steps` on keep the final value. Raises ValueError for a negative step.
    """
    if step < 0:
        raise ValueError(f"a learning rate exists for steps from 0 on, not for step {step}")
    return peak * _factor(config, min(step, total_steps), total_steps)


def _factor(config: ScheduleConfig, step: float, total_steps: int) -> float:
    warmup = duration_in_steps(config.warmup, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    cooldown = duration_in_steps(config.cooldown, total_steps)
    cooldown_start = total_steps - cooldown
    factor = _factor_before_cooldown(config, min(step, cooldown_start), warmup, cooldown_start, total_steps)
    if cooldown and step > cooldown_start:
        factor *= (total_steps - step) / cooldown
    return factor


def _factor_before_cooldown(config: ScheduleConfig, step: float, warmup: int, end: int, total_steps: int) -> float:
    if config.kind == "constant":
        return 1.0
    decay = duration_in_steps(config.decay, total_steps) or end - warmup
    assert config.final_factor is not None, "validate_schedule wants one for this kind"
    if config.kind == "exponential":
        factor: float = config.final_factor ** ((step - warmup) / decay)
        return factor
    start = total_steps - decay if config.kind == "wsd" else warmup
    shape = config.decay_shape if config.kind == "wsd" else config.kind
    progress = min(max((step - start) / decay, 0.0), 1.0) if decay else 1.0
    return config.final_factor + (1 - config.final_factor) * _decay(shape, progress)


def _decay(shape: str | None, progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    if shape == "linear":
        return 1 - progress
    if shape == "sqrt":
        return 1 - math.sqrt(progress)
    return 0.5 * (1 + math.cos(math.pi * progress))


def validate_schedule(config: ScheduleConfig, total_steps: int, prefix: str = "schedule") -> list[str]:
    """Every problem of `config` for a run of `total_steps` steps, one line each, with its key path."""
    if config.kind not in KINDS:
        return [f"{prefix}.kind: no such schedule ('{config.kind}'); choose one of {', '.join(KINDS)}"]
    problems = _field_problems(config, prefix)
    if problems:
        return problems
    return _length_problems(config, total_steps, prefix)


def _field_problems(config: ScheduleConfig, prefix: str) -> list[str]:
    required, optional = _REQUIRED[config.kind], _OPTIONAL[config.kind]
    problems = []
    for name in ("decay", "decay_shape", "final_factor", "cooldown"):
        value = getattr(config, name)
        if value is None and name in required:
            problems.append(f"{prefix}.{name}: kind={config.kind} needs a value (it is null); set it")
        if value is not None and name not in (*required, *optional):
            problems.append(f"{prefix}.{name}: set ({value}), but kind={config.kind} does not use it; set it to null")
    for name in ("warmup", "decay", "cooldown"):
        problems += _duration_problems(getattr(config, name), f"{prefix}.{name}")
    if config.decay_shape is not None and config.decay_shape not in DECAY_SHAPES:
        problems.append(
            f"{prefix}.decay_shape: no such shape ('{config.decay_shape}'); choose one of {', '.join(DECAY_SHAPES)}"
        )
    if config.final_factor is not None and not 0 <= config.final_factor <= 1:
        problems.append(f"{prefix}.final_factor: must lie in 0..1 ({config.final_factor}); it is a share of the peak")
    if config.kind == "exponential" and config.final_factor == 0:
        problems.append(
            f"{prefix}.final_factor: an exponential never reaches 0 (0); choose a value above 0 and let "
            f"{prefix}.cooldown end the run at 0"
        )
    return problems


def _duration_problems(duration: int | float | None, key: str) -> list[str]:
    if duration is None:
        return []
    if isinstance(duration, bool) or not math.isfinite(duration) or duration < 0:
        return [f"{key}: not a duration ({duration}); give steps (such as 2000) or a share of the run (such as 0.01)"]
    if duration >= 1 and duration != int(duration):
        return [f"{key}: steps come in whole numbers ({duration}); write {round(duration)}, or a share below 1"]
    if duration == 1 and isinstance(duration, float):
        return [f"{key}: 1.0 is neither clearly one step nor clearly the whole run; write 1 for one step"]
    return []


def _length_problems(config: ScheduleConfig, total_steps: int, prefix: str) -> list[str]:
    # A cosine or linear decay may outlast the run, and the exponential's `decay` is a time constant, not a length.
    counted = ["warmup", "decay"] if config.kind == "wsd" else ["warmup", "cooldown"]
    parts = {name: duration_in_steps(getattr(config, name), total_steps) for name in counted}
    problems = []
    if sum(parts.values()) > total_steps:
        listing = " + ".join(f"{name} {steps}" for name, steps in parts.items() if steps)
        keys = " or ".join(f"{prefix}.{name}" for name, steps in parts.items() if steps)
        problems.append(
            f"{prefix}: {listing} = {sum(parts.values())} steps do not fit into the run's {total_steps} steps; "
            f"shorten {keys}, lengthen the run, or take a schedule whose parts are shares of the run, such as "
            f"{prefix}=cosine"
        )
    if config.decay is not None and duration_in_steps(config.decay, total_steps) == 0:
        problems.append(
            f"{prefix}.decay: {config.decay} of the run's {total_steps} steps rounds to no step at all; "
            "choose a longer decay"
        )
    return problems
