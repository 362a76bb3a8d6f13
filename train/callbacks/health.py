"""Tells of ranks that hold the others up, of slow saves, and of GPUs that are hot, slowed down or have memory errors.

Every rank posts what it has measured itself, and rank 0 looks at it at an interval: no collective, and nobody waits.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.callbacks.alerts import Alert
from train.callbacks.base import Callback
from train.decisions import CONTINUE, Decision
from train.health.gpu import GpuWatch, GpuWindow, gpu_problems, nvml_reader, worst_of_host
from train.health.saves import SaveTimes
from train.health.stragglers import Lag, Persistent, compared_phases, lags
from train.watch.whereabouts import DATA

if TYPE_CHECKING:
    from train.trainer import Trainer

# Seconds between what a rank posts.
_POST_INTERVAL = 1.0
# A lag of a step that is less than so many seconds is told of nowhere.
_NEGLIGIBLE = 0.01


@dataclass(frozen=True)
class _Notice:
    """What a rank has posted: counts since its start, so that any two of them give what lies between."""

    host: str
    # Seconds of its own clock, steps begun, and seconds by phase.
    time: float
    steps: int
    seconds: dict[str, float]
    gpu: dict[str, Any] | None

    @classmethod
    def of(cls, trainer: Trainer, gpu: GpuWindow | None) -> _Notice:
        whereabouts = trainer.mesh.whereabouts
        told = None if gpu is None else gpu.as_json()
        return cls(platform.node(), time.monotonic(), whereabouts.now.turn, whereabouts.clock.seconds(), told)


class Health(Callback):
    """Behind the callbacks that take up what it finds."""

    def __init__(self) -> None:
        self._gpu: GpuWatch | None = None
        self._posted = -_POST_INTERVAL
        # Of every rank, where the window began that is under way.
        self._before: dict[int, _Notice] = {}
        self._stragglers = Persistent(1)
        self._gpu_problems = Persistent(1)
        self._saves = SaveTimes()
        self._last_save: float | None = None

    def on_run_start(self, trainer: Trainer) -> None:
        config = trainer.config.health
        self._stragglers = Persistent(config.straggler_windows)
        if config.window_seconds is not None and (read := nvml_reader(trainer.device)) is not None:
            self._gpu = GpuWatch(read, config.window_seconds)

    def on_step_end(self, trainer: Trainer) -> Decision:
        if trainer.is_main:
            self._judge_saves(trainer)
        watchdog, window = trainer.context.watchdog, trainer.config.health.window_seconds
        now = time.monotonic()
        if watchdog is None or window is None or now - self._posted < _POST_INTERVAL:
            return CONTINUE
        self._posted = now
        notice = _Notice.of(trainer, None if self._gpu is None else self._gpu.latest)
        watchdog.post(json.dumps(vars(notice)))
        if trainer.is_main:
            notices = {rank: _Notice(**json.loads(text)) for rank, text in watchdog.notices().items()}
            notices[0] = notice
            self._look(trainer, notices, window)
        return CONTINUE

    def _look(self, trainer: Trainer, notices: dict[int, _Notice], window: float) -> None:
        """Compare ranks since the last time, once that is long enough and each has begun another step."""
        if not self._before:
            # What the first steps of a start take says nothing of the others.
            self._before = notices if len(notices) == trainer.mesh.size else {}
            return
        if len(notices) < trainer.mesh.size or notices[0].time - self._before[0].time < window:
            return
        steps = {rank: notice.steps - self._before[rank].steps for rank, notice in notices.items()}
        if min(steps.values()) < 1:
            return
        own, step_seconds = {}, {}
        for rank, notice in notices.items():
            before = self._before[rank]
            own[rank] = {
                phase: (seconds - before.seconds.get(phase, 0.0)) / steps[rank]
                for phase, seconds in notice.seconds.items()
            }
            step_seconds[rank] = (notice.time - before.time) / steps[rank]
        self._before = notices
        parallel = trainer.config.parallel
        found = lags(own, compared_phases(parallel.zero_stage, parallel.pipeline))
        gpus = {rank: GpuWindow.from_json(notice.gpu) for rank, notice in notices.items() if notice.gpu}
        self._judge_stragglers(trainer, found, notices, step_seconds[0])
        self._judge_gpus(trainer, gpus, notices)
        if found or gpus:
            waits = max(own[rank].get(DATA, 0.0) / step_seconds[rank] for rank in own)
            trainer.dispatch("on_health", _record(found, gpus, notices, step_seconds[0], waits))

    def _judge_stragglers(
        self, trainer: Trainer, found: list[Lag], notices: Mapping[int, _Notice], step_seconds: float
    ) -> None:
        config = trainer.config.health
        slow = {
            lag.rank: lag
            for lag in found
            if lag.seconds > config.straggler_share * step_seconds and lag.seconds > _NEGLIGIBLE
        }
        for rank in self._stragglers.new(list(slow)):
            assert isinstance(rank, int)
            lag, host = slow[rank], notices[rank].host
            trainer.events.append(
                "straggler",
                step=trainer.step,
                rank=rank,
                host=host,
                phase=lag.phase,
                lag_seconds=round(lag.seconds, 4),
                step_seconds=round(step_seconds, 4),
            )
            self._tell(
                trainer,
                "straggler",
                f"rank {rank} on {host} holds the others up: {lag.seconds:.3g} s of each step of {step_seconds:.3g} s, "
                f"most of them in '{lag.phase}' (health.straggler_share={config.straggler_share:g})",
            )

    def _judge_gpus(self, trainer: Trainer, gpus: Mapping[int, GpuWindow], notices: Mapping[int, _Notice]) -> None:
        problems = {
            (rank, kind): words
            for rank, window in gpus.items()
            for kind, words in gpu_problems(window, trainer.config.health).items()
        }
        for what in self._gpu_problems.new(list(problems)):
            assert isinstance(what, tuple)
            rank, kind = what
            host = notices[rank].host
            trainer.events.append("gpu", step=trainer.step, rank=rank, host=host, kind=kind, problem=problems[what])
            self._tell(trainer, "gpu", f"the GPU of rank {rank} on {host} {problems[what]}")

    def _judge_saves(self, trainer: Trainer) -> None:
        while trainer.completed_saves:
            save = trainer.completed_saves.popleft()
            since_last = None if self._last_save is None else save.ended - self._last_save
            self._last_save = save.ended
            problem = self._saves.problem(save.seconds, since_last, trainer.config.health)
            if problem:
                trainer.events.append(
                    "slow_save", step=save.step, checkpoint=save.checkpoint, seconds=save.seconds, problem=problem
                )
                self._tell(trainer, "slow_save", f"{save.checkpoint} {problem}")

    def _tell(self, trainer: Trainer, rule: str, words: str) -> None:
        trainer.context.warn(words)
        trainer.dispatch("on_alert", Alert(rule, trainer.step, words))

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        if self._gpu is not None:
            self._gpu.close()
            self._gpu = None

    def state_dict(self) -> dict[str, Any]:
        return {"save_seconds": list(self._saves.seconds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saves.seconds.clear()
        self._saves.seconds.extend(state.get("save_seconds", []))


def _record(
    found: list[Lag],
    gpus: Mapping[int, GpuWindow],
    notices: Mapping[int, _Notice],
    step_seconds: float,
    data_wait_fraction: float,
) -> dict[str, Any]:
    """A line `health`."""
    hosts: dict[str, list[GpuWindow]] = {}
    for rank, window in gpus.items():
        hosts.setdefault(notices[rank].host, []).append(window)
    slowest = found[0] if found else None
    return {
        "step_seconds": step_seconds,
        "data_wait_fraction": data_wait_fraction,
        "slowest_rank": None if slowest is None else slowest.rank,
        "slowest_host": None if slowest is None else notices[slowest.rank].host,
        "slowest_phase": None if slowest is None else slowest.phase,
        "lag_seconds": None if slowest is None else slowest.seconds,
        "lag_fraction": None if slowest is None else slowest.seconds / step_seconds,
        "hosts": {host: worst_of_host(windows) for host, windows in hosts.items()},
    }
