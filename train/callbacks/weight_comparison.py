"""Ends the run where a process holds other weights than it should: a bit flipped in memory, or a device that computes
wrongly, and nothing else would tell."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from model.accounting import parameter_shapes
from model.locate import complete_checkpoints, step_of
from train.callbacks.base import Callback
from train.decisions import CONTINUE, Decision
from train.errors import RunError
from train.parallel.replicas import Deviation, deviating_gradients, deviating_weights
from train.watch.whereabouts import BETWEEN_STEPS, REDUCE

if TYPE_CHECKING:
    from train.trainer import Trainer

# Parameters that are told of each rank.
_NAMED = 8


class WeightComparison(Callback):
    """Every `numbers.compare_interval` steps and at the last one. Before what is saved at that step."""

    def __init__(self) -> None:
        # Completed steps when all was last found equal; as they began, all ranks were.
        self._equal_after = 0

    def on_gradients_ready(self, trainer: Trainer) -> None:
        # The step under way counts as completed where its weights are compared.
        if trainer.config.numbers.compare_gradients and self._is_due(trainer, trainer.step + 1):
            found = deviating_gradients(trainer.engine, self._names(trainer))
            self._end_where(found, trainer, "gradients")

    def on_step_end(self, trainer: Trainer) -> Decision:
        if self._is_due(trainer, trainer.step):
            whereabouts = trainer.mesh.whereabouts
            whereabouts.enter(REDUCE)
            found = deviating_weights(trainer.engine, self._names(trainer))
            whereabouts.enter(BETWEEN_STEPS)
            self._end_where(found, trainer, "weights")
            self._equal_after = trainer.step
        return CONTINUE

    def state_dict(self) -> dict[str, Any]:
        return {"equal_after": self._equal_after}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._equal_after = state.get("equal_after", 0)

    def _is_due(self, trainer: Trainer, completed: int) -> bool:
        interval = trainer.config.numbers.compare_interval
        return bool(interval) and (completed % interval == 0 or completed == trainer.total_steps)

    def _names(self, trainer: Trainer) -> list[str]:
        return list(parameter_shapes(trainer.config.model))

    def _end_where(self, found: Sequence[Deviation], trainer: Trainer, what: str) -> None:
        if not found:
            return
        hosts = trainer.mesh.gather_objects(platform.node(), group="world")
        for deviation in found:
            trainer.events.append(
                "deviation",
                step=trainer.step,
                rank=deviation.rank,
                host=hosts[deviation.rank],
                what=what,
                certain=deviation.is_certain,
                parameters=len(deviation.names),
                first_parameters=list(deviation.names[:_NAMED]),
            )
        # The one under way would be in place a moment later.
        trainer.settle_save()
        folders = complete_checkpoints(trainer.context.directory.checkpoints)
        later = [folder.name for folder in folders if step_of(folder) > self._equal_after]
        told = "; ".join(_describe(deviation, hosts[deviation.rank]) for deviation in found)
        is_known = all(deviation.is_certain for deviation in found)
        doubt = "" if is_known else ". As many say one thing as another, so which of them is wrong cannot be told"
        remove = f"remove {', '.join(later)}, saved since, " if later else "leave the checkpoints as they are "
        raise RunError(
            f"step {trainer.step}: {what} are not what all processes should hold: {told}{doubt}. A bit has flipped in "
            "the memory there, or a device computes wrongly. All were equal after step "
            f"{self._equal_after} (numbers.compare_interval={trainer.config.numbers.compare_interval}). Keep that "
            f"machine out of the run, {remove}and start the same command again"
        )


def _describe(deviation: Deviation, host: str) -> str:
    more = f" and {len(deviation.names) - 1} more" if len(deviation.names) > 1 else ""
    certainly = "rank" if deviation.is_certain else "perhaps rank"
    return f"{certainly} {deviation.rank} on {host} ({deviation.names[0]}{more})"
