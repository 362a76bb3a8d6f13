"""When held-out sets are scored: at an interval and at the end of the run."""

from __future__ import annotations

from train.callbacks.base import Callback
from train.evaluate import evaluate


class Evaluation(Callback):
    def on_step_end(self, trainer) -> None:
        interval = trainer.config.evaluation.interval
        at_interval = interval and trainer.step % interval == 0
        if trainer.config.evaluation.sets and (at_interval or trainer.step == trainer.total_steps):
            results = evaluate(trainer.engine, trainer.config.evaluation, trainer.evaluation_corpora)
            trainer.restart_clock()
            trainer.dispatch("on_evaluation", results)
