"""The mirror of a run's checkpoints, as the run uses it."""

from __future__ import annotations

from model.locate import step_folder, step_of
from train.callbacks.checkpointing import steps_that_stay
from train.checkpoints.mirror import Mirror, VoidNote
from train.checkpoints.retention import Retention
from train.context import RunContext


def make_mirror(context: RunContext) -> Mirror | None:
    """What copies the run's checkpoints to its mirror, on rank 0; None elsewhere, and where the run has no mirror."""
    store, directory = context.mirror_store, context.directory
    if store is None or not context.mesh.is_main:
        return None

    def on_copied(step: int, seconds: float) -> None:
        name = step_folder(directory.checkpoints, step).name
        context.events.append("mirror", step=step, checkpoint=name, seconds=round(seconds, 3))

    keep_last = context.config.checkpoint.mirror_keep_last
    note = VoidNote(directory.mirror_void)
    mirror = Mirror(store, directory.checkpoints, note, context.attempt, keep_last, on_copied)
    context.closing.callback(mirror.close)
    return mirror


def bring_last_to_mirror(context: RunContext) -> None:
    """Let the mirror have the last checkpoint of a complete run, which ended before all of it was there. Collective."""
    config = context.config.checkpoint
    if context.mirror_store is None or context.checkpoint is None or context.saved is None:
        return
    problem, mirror, step = None, make_mirror(context), step_of(context.checkpoint)
    if mirror is not None:
        mirror.request(step, Retention(config.keep_last, config.keep_every, steps_that_stay(context.saved.callbacks)))
        problem = mirror.settle(config.mirror_seconds)
    problem = context.mesh.broadcast_object(problem, group="world")
    if problem is not None:
        context.report_mirror_failed(step, problem)
