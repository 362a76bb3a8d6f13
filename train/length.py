"""How long a run is, how much of it is left, and where it stands in its schedule, whatever changed on the way.

A length in steps counts steps. A length in tokens counts tokens: the run ends with the first step that reaches it,
also where the batch size or the sequence length became another on resume, and its schedule is a curve over tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from train.checkpoints.state import TrainState
from train.config import RunConfig
from train.schedule import last_phase_begins, learning_rate
from train.stored_configuration import as_json, in_current_form


def steps_left(config: RunConfig, state: TrainState) -> int:
    """Steps of today's batch that `state` lacks to the end of the run."""
    training = config.training
    if training.total_tokens is None:
        return max(0, config.total_steps - state.step)
    return max(0, -(-(training.total_tokens - state.tokens) // config.tokens_per_step))


def last_step(config: RunConfig, state: TrainState) -> int:
    """The number of completed steps at which the run ends; of a run that is already longer, what it has."""
    return state.step + steps_left(config, state)


def schedule_length(config: RunConfig, state: TrainState) -> int:
    """The run's length in the steps that its schedule counts."""
    if config.training.total_tokens is None:
        return config.total_steps
    return -(-config.training.total_tokens // state.schedule_step_tokens)


def learning_rate_of_next_step(config: RunConfig, state: TrainState) -> float:
    """The rate of the step that follows `state`."""
    rate, length = config.optimizer.learning_rate, schedule_length(config, state)
    return learning_rate(config.schedule, rate, _position(config, state), length)


def last_phase_begins_now(config: RunConfig, state: TrainState) -> bool:
    """Whether the latest step was the last one before the rate falls for good (`train.schedule.last_phase_begins`)."""
    begins = last_phase_begins(config.schedule, schedule_length(config, state))
    step = 1.0
    if config.training.total_tokens is not None:
        step = config.tokens_per_step / state.schedule_step_tokens
    return begins is not None and _position(config, state) - step < begins <= _position(config, state)


def _position(config: RunConfig, state: TrainState) -> float:
    """Where the run stands in its schedule, in the steps that the schedule counts."""
    if config.training.total_tokens is None:
        return state.applied_steps
    return state.applied_tokens / state.schedule_step_tokens


def begin(config: RunConfig, data_identity: dict[str, Any]) -> TrainState:
    """The state of a run before its first step."""
    return TrainState(
        data_identity=data_identity,
        schedule_step_tokens=config.tokens_per_step,
        configuration=as_json(config),
    )


def taken_over(config: RunConfig, state: TrainState) -> TrainState:
    """`state`, as a checkpoint has it, as it goes on under `config`.

    Durations in steps of a schedule over tokens stay what they were while the schedule stays: steps of the batch that
    it was set for. A schedule that is set anew counts today's steps.
    """
    now, step_tokens = as_json(config), state.schedule_step_tokens
    if state.configuration:
        before = in_current_form(state.configuration)
        in_tokens = [form["training"]["total_tokens"] is not None for form in (before, now)]
        if not all(in_tokens) or before["schedule"] != now["schedule"]:
            step_tokens = config.tokens_per_step
    return dataclasses.replace(state, schedule_step_tokens=step_tokens, configuration=now)
