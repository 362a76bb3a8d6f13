"""What becomes of a run whose loss or gradient is not finite, or jumps, again and again.

A step that is not finite is skipped by the trainer. Several of them within a window of steps take the run back to the
newest checkpoint before the first of them, and the samples since then are left out. Where that has not helped often
enough, the run ends. All of it follows from numbers that every rank has on the host anyway, so all ranks decide alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from train.callbacks.base import Callback
from train.decisions import CONTINUE, Decision, Rollback
from train.errors import RunError

if TYPE_CHECKING:
    from train.trainer import Trainer

# Steps that the running median looks back on, and how many there must be before anything counts as a spike.
WINDOW = 128
MINIMUM_HISTORY = 32
_WATCHED = ("loss", "grad_norm")


@dataclass(frozen=True)
class _BadStep:
    """A step that counts towards a rollback."""

    # From 0.
    index: int
    first_sample: int
    samples: int

    def describe(self) -> str:
        return f"step {self.index} (samples {self.first_sample}:{self.samples})"


class BadSteps(Callback):
    """Logs spikes as events; takes the run back, or ends it, as `numbers` in the configuration says."""

    def __init__(self) -> None:
        self._history: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in _WATCHED}
        # Within the window, oldest first.
        self._bad: list[_BadStep] = []
        # Times that the run went back because of them.
        self._rollbacks = 0
        self._has_asked = False

    def on_step_end(self, trainer: Trainer) -> Decision:
        numbers = trainer.config.numbers
        spikes = self._watch(trainer, {"loss": trainer.last_loss, "grad_norm": trainer.last_gradient_norm})
        if numbers.bad_steps is None:
            return CONTINUE
        is_bad = not trainer.last_was_applied or (spikes and numbers.count_spikes)
        self._bad = [bad for bad in self._bad if bad.index >= trainer.step - numbers.window]
        if is_bad:
            samples = trainer.last_samples
            self._bad.append(_BadStep(trainer.step - 1, samples.start, len(samples)))
        trainer.keep_checkpoint_of(self._bad[0].index if self._bad else None)
        if not is_bad or len(self._bad) < numbers.bad_steps:
            return CONTINUE
        first, last = self._bad[0], self._bad[-1]
        found = (
            f"{len(self._bad)} of the last {numbers.window} steps were bad, from {first.describe()} to "
            f"{last.describe()}"
        )
        if self._rollbacks >= numbers.max_rollbacks:
            self._give_up(trainer, found, first)
        self._has_asked = True
        return Rollback(first.index, skip=None, reason=found)

    def on_rollback(self, trainer: Trainer, rollback: Rollback, left: int) -> None:
        if self._has_asked:
            self._rollbacks += 1
            self._has_asked = False

    def state_dict(self) -> dict[str, Any]:
        history = {name: list(history) for name, history in self._history.items()}
        return {**history, "bad_steps": [asdict(bad) for bad in self._bad], "rollbacks": self._rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, history in self._history.items():
            history.clear()
            history.extend(state.get(name, []))
        self._bad = [_BadStep(**bad) for bad in state.get("bad_steps", [])]
        # A checkpoint that the run went back to knows less of them than the run does.
        self._rollbacks = max(self._rollbacks, state.get("rollbacks", 0))

    def _watch(self, trainer: Trainer, latest: dict[str, float]) -> bool:
        """Make events of what has jumped; returns whether anything has."""
        factor, spikes = trainer.config.logging.spike_factor, False
        for name, value in latest.items():
            # Steps that are not finite are skipped and logged by the trainer; they say nothing about the usual size.
            if not math.isfinite(value):
                continue
            history = self._history[name]
            if len(history) >= MINIMUM_HISTORY:
                median = statistics.median(history)
                if value > factor * median:
                    spikes = True
                    samples = trainer.last_samples
                    trainer.events.append(
                        "spike",
                        step=trainer.step,
                        quantity=name,
                        value=value,
                        median=median,
                        first_sample=samples.start,
                        samples=len(samples),
                    )
            history.append(value)
        return spikes

    def _give_up(self, trainer: Trainer, found: str, first: _BadStep) -> None:
        limit = trainer.config.numbers.max_rollbacks
        times = "once" if limit == 1 else f"{limit} times"
        corpus, run = trainer.config.corpus.directory, trainer.run_directory
        samples = f"{first.first_sample}:{first.samples}"
        # Text that is tokenized while it is read cannot be looked up.
        text = f" and at the text (python -m data_pipeline inspect {corpus} --run {run} --samples {samples})"
        raise RunError(
            f"{found}; going back {times} (numbers.max_rollbacks={limit}) has not helped. Look at the events 'skip', "
            f"'spike' and 'rollback', at the statistics of layers{'' if corpus is None else text}. Then lower "
            "optimizer.learning_rate, leave samples out by training.skip_samples=[[FIRST, COUNT]], or raise "
            "numbers.max_rollbacks, and start the same command again"
        )


def goes_back_to(callbacks: Mapping[str, Mapping[str, Any]]) -> int | None:
    """The step that a run may go back to, or before, by the states of a checkpoint's callbacks; None: it may not."""
    bad = callbacks.get(BadSteps.__name__, {}).get("bad_steps", [])
    return int(bad[0]["index"]) if bad else None
