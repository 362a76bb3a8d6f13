"""Tells at once when a figure of the run leaves its range, a checkpoint cannot be written, or the run fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conf.passwords import without_passwords
from train.alert_rules import Watched, rules_about
from train.callbacks.base import Callback
from train.callbacks.webhook import Webhook
from train.decisions import CONTINUE, Decision
from train.health.record import health_figures

if TYPE_CHECKING:
    from train.evaluate import EvaluationResult
    from train.trainer import Trainer

WEBHOOK_VARIABLE = "XLSTM_ALERT_WEBHOOK"
# Figures that one message lists.
_LISTED = 3


@dataclass(frozen=True)
class Alert:
    """Something that a person should look at."""

    # A name of alerts.rules, `save_failed`, `mirror_failed`, `run_failed`, or an event of the machines' health.
    rule: str
    step: int
    words: str


class Alerts(Callback):
    """Judges the figures that all ranks have alike; rank 0 tells. Other callbacks hear of it by `on_alert`."""

    def __init__(self) -> None:
        self._webhook: Webhook | None = None
        self._watched: dict[str, dict[str, Watched]] = {}
        self._told: dict[str, int] = {}
        self._state: dict[str, Any] = {}

    def on_run_start(self, trainer: Trainer) -> None:
        url = trainer.config.alerts.webhook or os.environ.get(WEBHOOK_VARIABLE)
        if url and trainer.is_main:
            self._webhook = Webhook(url)

    def on_metrics(self, trainer: Trainer, record: dict[str, Any]) -> Decision:
        values = {name: value for name, value in record.items() if isinstance(value, float)}
        self._judge(trainer, values)
        return CONTINUE

    def on_statistics(self, trainer: Trainer, values: dict[str, float]) -> Decision:
        self._judge(trainer, values)
        return CONTINUE

    def on_evaluation(self, trainer: Trainer, results: dict[str, EvaluationResult]) -> Decision:
        self._judge(trainer, {f"evaluation/{name}/loss": result.loss for name, result in results.items()})
        return CONTINUE

    def on_health(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self._judge(trainer, health_figures(record))

    def on_alert(self, trainer: Trainer, alert: Alert) -> None:
        trainer.events.append("alert", step=alert.step, rule=alert.rule, words=alert.words)
        self._send(trainer, alert)

    def on_save_failed(self, trainer: Trainer, problems: dict[int, str]) -> None:
        told = "; ".join(f"rank {rank}: {problem}" for rank, problem in problems.items())
        trainer.dispatch("on_alert", Alert("save_failed", trainer.step, f"a checkpoint could not be written ({told})"))

    def on_mirror_failed(self, trainer: Trainer, problem: str) -> None:
        trainer.dispatch("on_alert", Alert("mirror_failed", trainer.step, problem))

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        if outcome == "failed":
            error = sys.exception()
            self._send(trainer, Alert("run_failed", trainer.step, f"the run failed: {error}"))
        if self._webhook is not None:
            self._webhook.close()
            self._webhook = None

    def _judge(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        config = trainer.config.alerts
        found: dict[str, list[str]] = {}
        for figure, value in values.items():
            for name in rules_about(figure, config.rules):
                if problem := self._watch(trainer, name, figure).problem(value):
                    found.setdefault(name, []).append(f"{figure}: {problem}")
        for name, problems in found.items():
            told = self._told.get(name)
            if told is None or trainer.step - told >= config.pause_steps:
                self._told[name] = trainer.step
                more = f"; and {len(problems) - _LISTED} more figures" if len(problems) > _LISTED else ""
                alert = Alert(name, trainer.step, "; ".join(problems[:_LISTED]) + more)
                trainer.context.warn(f"{alert.rule}: {alert.words}")
                trainer.dispatch("on_alert", alert)

    def _watch(self, trainer: Trainer, name: str, figure: str) -> Watched:
        figures = self._watched.setdefault(name, {})
        if figure not in figures:
            figures[figure] = Watched.under(trainer.config.alerts.rules[name])
            if (state := self._state.get(name, {}).get(figure)) is not None:
                figures[figure].load_state_dict(state)
        return figures[figure]

    def _send(self, trainer: Trainer, alert: Alert) -> None:
        if self._webhook is not None:
            name = trainer.config.name
            text = without_passwords(f"{name}, step {alert.step:,}: {alert.rule}: {alert.words}")
            self._webhook.send({"text": text, "run": name, "step": alert.step, "rule": alert.rule})

    def state_dict(self) -> dict[str, Any]:
        # A figure that has not come since the start is still what it was: held-out losses are rare.
        watched = {name: dict(figures) for name, figures in self._state.items()}
        for name, figures in self._watched.items():
            watched.setdefault(name, {}).update({figure: one.state_dict() for figure, one in figures.items()})
        return {"watched": watched, "told": self._told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._watched, self._state = {}, state.get("watched", {})
        self._told = dict(state.get("told", {}))
