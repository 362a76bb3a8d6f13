"""When held-out sets are scored: at an interval and at the end of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.callbacks.base import Callback
from train.decisions import CONTINUE, Decision
from train.evaluate import evaluate
from train.watch.whereabouts import BETWEEN_STEPS

if TYPE_CHECKING:
    from train.trainer import Trainer


class Evaluation(Callback):
    """Scores every set of `evaluation.sets` and dispatches `on_evaluation`."""

    def on_step_end(self, trainer: Trainer) -> Decision:
        interval = trainer.config.evaluation.interval
        at_interval = interval and trainer.step % interval == 0
        if trainer.config.evaluation.sets and (at_interval or trainer.step == trainer.total_steps):
            results = evaluate(trainer.engine, trainer.config, trainer.evaluation_corpora)
            trainer.mesh.whereabouts.enter(BETWEEN_STEPS)
            trainer.restart_clock()
            trainer.dispatch("on_evaluation", results)
        return CONTINUE
