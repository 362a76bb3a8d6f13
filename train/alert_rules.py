"""Rules about the figures of a run: in which range each should be, and what is said of one that is not."""

from __future__ import annotations

import fnmatch
import math
import statistics
import typing
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from conf.problems import at_least

THRESHOLDS = ("above", "below", "above_median", "above_lowest")


@dataclass(frozen=True)
class AlertRule:
    """Figures of one kind, and from where on they are told of. One that is not finite is told of by every rule."""

    # Names of figures, * for any part: keys of the lines train (loss, grad_norm, ...), names of statistics, or
    # evaluation/<set>/loss.
    figure: str = "???"
    # Told of above this.
    above: float | None = None
    # Told of below this.
    below: float | None = None
    # Told of above so many times the median of the last `window` values.
    above_median: float | None = None
    # Told of where the median of the last `window` values is so much above the lowest such median of the run.
    above_lowest: float | None = None
    # Values that a median is of.
    window: int = 16
    # Values in a row that must be out of range.
    times: int = 1


@dataclass(frozen=True)
class AlertsConfig:
    """Figures that are told of when they leave their range: event `alert`, terminal, W&B and webhook."""

    # By names of your own; conf/alerts/default.yaml has those that every run gets.
    rules: dict[str, AlertRule] = field(default_factory=dict)
    # Steps before the same rule may tell again.
    pause_steps: int = 1000
    # URL that gets each alert by POST, as a JSON object with the key `text` and others, as chat programs take it;
    # null: what the environment variable XLSTM_ALERT_WEBHOOK says, which leaves no trace in the run's folder.
    webhook: str | None = None


def validate_alerts(config: AlertsConfig, prefix: str) -> list[str]:
    """The problems of the keys under `prefix`, one line each. Pure."""
    problems = at_least(f"{prefix}.pause_steps", config.pause_steps, 0)
    for name, rule in config.rules.items():
        key = f"{prefix}.rules.{name}"
        if not rule.figure.strip():
            problems.append(f"{key}.figure: empty; name a figure, such as loss or *.gradient_norm")
        if all(getattr(rule, threshold) is None for threshold in THRESHOLDS):
            problems.append(f"{key}: has no threshold; set one of {', '.join(THRESHOLDS)}")
        if rule.above_median is not None and not rule.above_median > 1:
            problems.append(f"{key}.above_median: must be above 1 ({rule.above_median})")
        problems += [*at_least(f"{key}.window", rule.window, 1), *at_least(f"{key}.times", rule.times, 1)]
    if config.webhook is not None:
        problems += webhook_problems(f"{prefix}.webhook", config.webhook)
    return problems


def webhook_problems(key: str, url: str) -> list[str]:
    """What is wrong with the URL of a webhook."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https") and parts.hostname:
        return []
    return [f"{key}: is no http:// or https:// URL ({url!r})"]


@dataclass
class Watched:
    """One figure under one rule."""

    rule: AlertRule
    history: deque[float]
    lowest: float | None = None
    # Values out of range, without one in range since.
    in_a_row: int = 0

    @classmethod
    def under(cls, rule: AlertRule) -> Watched:
        """A figure without a value yet."""
        return cls(rule, deque(maxlen=rule.window))

    def problem(self, value: float) -> str:
        """Take up the next value; what is wrong with it, "" where nothing is or not yet often enough."""
        words = "; ".join(self._out_of_range(value)) if math.isfinite(value) else "is not finite"
        if math.isfinite(value):
            self._remember(value)
        self.in_a_row = self.in_a_row + 1 if words else 0
        return words if self.in_a_row >= self.rule.times else ""

    def _out_of_range(self, value: float) -> typing.Iterator[str]:
        rule = self.rule
        if rule.above is not None and value > rule.above:
            yield f"{value:.4g} is above {rule.above:g}"
        if rule.below is not None and value < rule.below:
            yield f"{value:.4g} is below {rule.below:g}"
        if rule.above_median is not None and len(self.history) == rule.window:
            median = statistics.median(self.history)
            if value > rule.above_median * median:
                yield f"{value:.4g} is more than {rule.above_median:g} times its median, {median:.4g}"
        if rule.above_lowest is not None and self.lowest is not None:
            recent = statistics.median([*self.history, value][-rule.window :])
            if recent > self.lowest + rule.above_lowest:
                yield f"{recent:.4g} is more than {rule.above_lowest:g} above its lowest, {self.lowest:.4g}"

    def _remember(self, value: float) -> None:
        self.history.append(value)
        if self.rule.above_lowest is not None and len(self.history) == self.rule.window:
            recent = statistics.median(self.history)
            self.lowest = recent if self.lowest is None else min(self.lowest, recent)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        needs_history = self.rule.above_median is not None or self.rule.above_lowest is not None
        history = list(self.history) if needs_history else []
        return {"history": history, "lowest": self.lowest, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.history.extend(state["history"])
        self.lowest, self.in_a_row = state["lowest"], state["in_a_row"]


def rules_about(figure: str, rules: Mapping[str, AlertRule]) -> list[str]:
    """Names of the rules that a figure falls under."""
    return [name for name, rule in rules.items() if fnmatch.fnmatchcase(figure, rule.figure)]
