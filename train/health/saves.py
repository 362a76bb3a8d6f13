"""Which checkpoints take unusually long to write."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

from train.health.config import HealthConfig


@dataclass(frozen=True)
class CompletedSave:
    """A checkpoint that counts."""

    # The name of its folder.
    checkpoint: str
    step: int
    # Of its background write.
    seconds: float
    # When it came to be, in seconds of this process's clock.
    ended: float


# Saves that a median is of, at most and at least.
_REMEMBERED, _NEEDED = 20, 3


class SaveTimes:
    """The checkpoints of a run, and how long each took."""

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=_REMEMBERED)

    def problem(self, seconds: float, since_last: float | None, config: HealthConfig) -> str:
        """Take up the next save; what is wrong with it, "" where nothing is.

        `seconds`: of its background write; `since_last`: from the end of the save before to its own, None where this
        is the first of a start.
        """
        words = []
        factor, share = config.slow_save_factor, config.slow_save_share
        if len(self.seconds) >= _NEEDED and seconds > factor * (median := statistics.median(self.seconds)):
            words.append(f"more than {factor:g} times the {median:.3g} s that others took (health.slow_save_factor)")
        if since_last is not None and seconds > share * since_last:
            words.append(
                f"more than {share:.0%} of the {since_last:.3g} s since the one before (health.slow_save_share)"
            )
        self.seconds.append(seconds)
        is_told = words and seconds > config.slow_save_seconds
        return f"took {seconds:.3g} s to write, {' and '.join(words)}" if is_told else ""
