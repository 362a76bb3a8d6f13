"""What a run watches of its processes and machines, and from where on it tells of them."""

from __future__ import annotations

from dataclasses import dataclass

from conf.problems import at_least


@dataclass(frozen=True)
class HealthConfig:
    """Ranks that hold the others up, slow saves, and GPUs that are hot, slowed down or have memory errors: events,
    warnings, alerts, and lines `health` in metrics.jsonl."""

    # Seconds over which ranks are compared and GPUs are looked at; null: never.
    window_seconds: float | None = 60.0
    # A rank is told of where each step takes so much longer because of it, as a share of the step ...
    straggler_share: float = 0.05
    # ... in so many windows in a row.
    straggler_windows: int = 3
    # A checkpoint is told of that takes more than so many seconds to write ...
    slow_save_seconds: float = 10.0
    # ... and so many times the median of the run's checkpoints ...
    slow_save_factor: float = 3.0
    # ... or more than this share of the time between two of them.
    slow_save_share: float = 0.5
    # A GPU is told of above this temperature, in degrees Celsius ...
    gpu_temperature: float = 85.0
    # ... where heat or its power supply slow it down for more than this share of the window ...
    gpu_slowed_share: float = 0.1
    # ... where its processors' clock never reaches this share of what it can be ...
    gpu_clock_share: float = 0.5
    # ... and after so many errors in its memory that were corrected. Of one that was not it is told at once.
    gpu_corrected_errors: int = 1000


def validate_health(config: HealthConfig, prefix: str) -> list[str]:
    """The problems of the keys under `prefix`, one line each. Pure."""
    problems = at_least(f"{prefix}.straggler_windows", config.straggler_windows, 1)
    if config.window_seconds is not None and not config.window_seconds > 0:
        problems.append(f"{prefix}.window_seconds: must be positive, or null for never ({config.window_seconds})")
    for name in ("straggler_share", "slow_save_share", "gpu_temperature"):
        if not getattr(config, name) > 0:
            problems.append(f"{prefix}.{name}: must be positive ({getattr(config, name)})")
    for name in ("gpu_slowed_share", "gpu_clock_share"):
        if not 0 <= getattr(config, name) <= 1:
            problems.append(f"{prefix}.{name}: is a share, from 0 to 1 ({getattr(config, name)})")
    if not config.slow_save_seconds >= 0:
        problems.append(f"{prefix}.slow_save_seconds: cannot be negative ({config.slow_save_seconds})")
    if not config.slow_save_factor > 1:
        problems.append(f"{prefix}.slow_save_factor: must be above 1 ({config.slow_save_factor})")
    return problems + at_least(f"{prefix}.gpu_corrected_errors", config.gpu_corrected_errors, 1)
