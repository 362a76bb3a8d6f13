"""What a run computes with, brought to a point of its course: from a checkpoint, or from the seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from model.accounting import parameter_shapes
from model.initialisation import initialise_parameter
from model.loading import open_stored
from train.changes import change_of_rate, changes_since, describe_resume
from train.checkpoints.generators import seed_everything
from train.checkpoints.lanes import LanesReader
from train.checkpoints.reader import load
from train.checkpoints.state import TrainState
from train.config import RunConfig
from train.context import RunContext
from train.data import changes_of_data, describe_changes
from train.length import begin, learning_rate_of_next_step, taken_over
from train.origin import read_ancestry
from train.parallel.engine import Engine, EngineFactory, make_engine
from train.parallel.fragments import ReadRange


@dataclass
class RunState:
    """An engine whose weights and moments belong to `train`."""

    engine: Engine
    train: TrainState


def restore(context: RunContext, factory: EngineFactory = make_engine) -> RunState:
    """Make the engine and fill it from the run's newest usable checkpoint or, when there is none, from its seed.

    Collective. The engine is closed with the context. Logs `start`, or `resume` and whether the data changed. Raises
    CheckpointError when the checkpoint is of another model.
    """
    config, events, mesh = context.config, context.events, context.mesh
    seed_everything(config.seed, mesh.rank)
    engine = factory(config, context.plan, mesh)
    context.closing.callback(engine.close)
    context.save_engine_settings(engine.describe())
    state = _bring_to(context, engine, context.checkpoint)
    if context.checkpoint is None:
        configuration = context.configuration_file
        events.append(
            "start",
            attempt=context.attempt.identity,
            world_size=mesh.size,
            steps=config.total_steps,
            configuration=configuration,
        )
    else:
        state = _accept(context, context.checkpoint, state)
    return RunState(engine, state)


def _accept(context: RunContext, checkpoint: Path, saved: TrainState) -> TrainState:
    """Log and say that the run goes on from `checkpoint`, and under what; returns `saved` as it does."""
    config = context.config
    state = taken_over(config, saved)
    _report_resume(context, checkpoint, saved, state)
    changes = changes_of_data(state.data_identity, context.data_identity)
    if changes:
        state.data_identity = context.data_identity
        reason = config.corpus.allow_changed_data
        context.events.append("data_changed", step=state.step, reason=reason, changes=changes)
        context.say(f"WARNING    the data are others than before ({describe_changes(changes)}), allowed for: {reason}")
    return state


def go_back(context: RunContext, engine: Engine, last_step: int) -> tuple[TrainState, Path | None]:
    """Fill `engine` again from the newest usable checkpoint of `last_step` or before; without one, from the seed.

    Collective. Returns what belongs to these weights, and the checkpoint.
    """
    checkpoint = context.newest_usable(last_step)
    if checkpoint is None:
        seed_everything(context.config.seed, context.mesh.rank)
    state = taken_over(context.config, _bring_to(context, engine, checkpoint))
    changes = changes_of_data(state.data_identity, context.data_identity)
    if changes:
        # Between that checkpoint and now the data changed, which was allowed at the time.
        state.data_identity = context.data_identity
        reason = context.config.corpus.allow_changed_data or "rollback behind an earlier change"
        context.events.append("data_changed", step=state.step, reason=reason, changes=changes)
    return state, checkpoint


def _bring_to(context: RunContext, engine: Engine, checkpoint: Path | None) -> TrainState:
    """Fill `engine`, with what its rows carry; returns the state that belongs to it. Collective."""
    config = context.config
    if checkpoint is None and config.resume_from is not None:
        # The beginning of a branch.
        checkpoint = Path(_source(context))
    if checkpoint is not None:
        state = load(checkpoint, engine, config.model)
        # Of other data the lanes mean nothing.
        _fill_carried(engine, None if changes_of_data(state.data_identity, context.data_identity) else checkpoint)
        return state
    _fill_carried(engine, None)
    read = drawn_weights(config) if config.initialise_from is None else open_stored(_source(context)).read_range
    engine.fill(read, 0)
    return begin(config, context.data_identity)


def _fill_carried(engine: Engine, checkpoint: Path | None) -> None:
    if engine.carried is None:
        return
    reader = None if checkpoint is None else LanesReader(checkpoint)
    engine.carried.fill(None if reader is None or reader.is_empty else reader.read)


def _source(context: RunContext) -> str:
    """Where the run began, by its events: its configuration may name a run that has gone on since. Collective."""
    ancestry = read_ancestry(context.directory.path) if context.mesh.is_main else None
    return str(context.mesh.broadcast_object(None if ancestry is None else ancestry["source"], group="world"))


def drawn_weights(config: RunConfig) -> ReadRange:
    """All weights as the run's seed draws them, by name and the same under every layout."""
    shapes = parameter_shapes(config.model)

    def read(name: str, offset: int, numel: int) -> Tensor:
        whole = initialise_parameter(config.model, name, shapes[name], config.seed)
        assert offset + numel <= math.prod(shapes[name]), (name, offset, numel)
        return whole.reshape(-1).narrow(0, offset, numel)

    return read


def _report_resume(context: RunContext, checkpoint: Path, saved: TrainState, state: TrainState) -> None:
    config = context.config
    changes, rate = changes_since(config, saved), change_of_rate(config, saved, state)
    context.events.append(
        "resume",
        attempt=context.attempt.identity,
        checkpoint=checkpoint.name,
        step=state.step,
        tokens=state.tokens,
        next_sample=state.next_sample,
        world_size=context.mesh.size,
        saved_by_world_size=state.world_size,
        zero_stage=config.parallel.zero_stage,
        saved_by_zero_stage=state.zero_stage,
        configuration=context.configuration_file,
        changes=changes,
        learning_rate_before=None if rate is None else rate.before,
        learning_rate=learning_rate_of_next_step(config, state),
    )
    lines = [
        f"Resuming '{config.name}' from {checkpoint.name}: {state.step} of {context.plan.total_steps} steps, "
        f"{state.tokens:,} tokens, next sample {state.next_sample:,}.",
        *describe_resume(changes, rate, state.step),
    ]
    context.say("\n".join(lines))
