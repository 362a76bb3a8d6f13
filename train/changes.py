"""A run that goes on under another configuration: what is refused, what is told, and what becomes of its rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from model.stored import what_is_computed
from train.checkpoints.state import TrainState
from train.config import CorpusConfig, RunConfig, TrainingConfig
from train.data import changes_of_data, describe_changes
from train.length import learning_rate_of_next_step
from train.optimizer import OptimizerConfig
from train.origin import KEYS, changes_of_origin
from train.run_directory import RunDirectory
from train.schedule import ScheduleConfig
from train.stored_configuration import as_json, configuration_before, differences, in_current_form, written

# A run resumed with another value of one of these would not be the same run.
_FIXED = ("seed", "model")
# Whatever the corpus, another value of one of these is another order of samples. What may be one, the data tell.
_ORDER = ("training.sequence_length", "corpus.split", "corpus.packing", "corpus.window_shards")
# Part of the data's identity -> keys that may change it.
_KEYS_OF_PART = {
    "corpus": ("corpus.directory", "corpus.live", "corpus.task"),
    "tokenizer": ("corpus.directory", "corpus.live", "corpus.task"),
    "split": ("corpus.split",),
    "sequence_length": ("training.sequence_length",),
    "mixture": ("corpus.weights", "corpus.temperature", "corpus.epoch_caps", "corpus.phases"),
    "packing": ("corpus.packing",),
    "lanes": ("training.carry_state", "training.carry_windows", "training.global_batch_size", "corpus.packing"),
    "window_shards": ("corpus.window_shards",),
}
# A share of the rate by which it may rise unnoticed: rounding.
_ROUNDING = 1e-9


def changes_of_run(config: RunConfig, directory: RunDirectory) -> list[str]:
    """Where the folder holds a run that differs in what must not change, one line each."""
    before, damage = configuration_before(directory)
    if damage and config.checkpoint.on_corrupt == "fail":
        return [f"checkpoint.on_corrupt: {problem}; restore it, or set skip to do without (fail)" for problem in damage]
    if before is None:
        return []
    now = as_json(config)
    before["model"], now["model"] = what_is_computed(before["model"]), what_is_computed(now["model"])
    problems = changes_of_origin(config, before, directory)
    if before["name"] != config.name:
        original = directory.path.with_name(str(before["name"]))
        problems.append(
            f"name: {directory.path} holds the run '{before['name']}', copied or renamed. To try something from one of "
            f"its steps, remove the copy and start a branch: name={config.name} resume_from={original}@STEP; to go on "
            f"with it, call the folder {original} again"
        )
    return problems + [
        f"{key}: {directory.path} was started with another value ({written(old)}, now {written(new)}); give the run "
        f"another name=..., or set {key}={written(old)}"
        for key, (old, new) in differences(before, now).items()
        if _is_within(key, _FIXED)
    ]


def changes_of_order(config: RunConfig, state: TrainState) -> list[str]:
    """Keys by which today's order of samples is another than that of `state`, whatever the corpus; one line each."""
    changed = {key: change for key, change in changes_since(config, state).items() if key in _ORDER}
    return [] if config.corpus.allow_changed_data else [_other_data(key, change) for key, change in changed.items()]


def refused_changes_of_data(config: RunConfig, state: TrainState, identity: dict[str, Any]) -> list[str]:
    """Why the position of `state` means nothing in data of today's `identity`, one line for each key; [] where it does.

    What the data are decides, not how they are named: a corpus that was moved is the same.
    """
    changes = changes_of_data(state.data_identity, identity)
    if not changes or config.corpus.allow_changed_data is not None:
        return []
    may_be_why = [key for part in changes for key in _KEYS_OF_PART.get(part, ())]
    if "mixture" in changes and any(phase.from_step is not None for phase in config.corpus.phases):
        may_be_why.append("training.global_batch_size")
    keys = {key: change for key, change in changes_since(config, state).items() if _is_within(key, may_be_why)}
    other_text = "corpus" in changes or "tokenizer" in changes
    if not keys or (other_text and not any(_is_within(key, _KEYS_OF_PART["corpus"]) for key in keys)):
        key, place = _place(config.corpus)
        keys[key] = [place, place]
    found = f" ({describe_changes(changes)})"
    return [
        _other_data(key, change, found if _is_within(key, _KEYS_OF_PART["corpus"]) else "")
        for key, change in keys.items()
    ]


def _place(corpus: CorpusConfig) -> tuple[str, str | None]:
    """The key that says where the data come from, and what it says."""
    if corpus.task is not None:
        return "corpus.task", corpus.task.name
    return ("corpus.directory", corpus.directory) if corpus.live is None else ("corpus.live", corpus.live.data.path)


def _other_data(key: str, change: list[Any], found: str = "") -> str:
    old, new = change
    told = (
        f"{written(new)} gives other data than {written(old)} gave"
        if old != new
        else f"{written(new)} holds other data than before"
    )
    return (
        f"{key}: {told}{found}, so the run's position in its data means nothing there; go back to the data it was "
        "trained on, or give the reason for the change in corpus.allow_changed_data='...'"
    )


def _is_within(key: str, sections: Iterable[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def changes_since(config: RunConfig, state: TrainState) -> dict[str, list[Any]]:
    """Key -> [value then, value now] of what differs from the configuration that brought the run to `state`."""
    if not state.configuration:
        return {}
    changes = differences(in_current_form(state.configuration), as_json(config))
    # The run's folder was found: where it lies now changes nothing. A branch is told by an event of its own.
    for key in ("run_root", "name", *KEYS):
        changes.pop(key, None)
    return changes


@dataclasses.dataclass(frozen=True)
class RateChange:
    """The learning rate of the next step: under the configuration until now, and under today's.

    Also as shares of the peak. The next step of a run that had ended is the one it would have taken.
    """

    before: float
    now: float
    share_before: float
    share_now: float

    @property
    def rises(self) -> bool:
        return self.now > self.before * (1 + _ROUNDING)

    @property
    def decays_again(self) -> bool:
        """Whether what had been taken off the peak is given back, at least in part."""
        return self.share_now > self.share_before * (1 + _ROUNDING)


def change_of_rate(config: RunConfig, state: TrainState, taken_over: TrainState) -> RateChange | None:
    """What a resume does to the rate. None where the configuration until now is not known.

    `state`: as the checkpoint has it; `taken_over`: as `taken_over` has made it today's.
    """
    if not state.configuration:
        return None
    stored = in_current_form(state.configuration)
    earlier = dataclasses.replace(
        config,
        training=TrainingConfig(**_known(TrainingConfig, stored["training"])),
        optimizer=OptimizerConfig(**_known(OptimizerConfig, stored["optimizer"])),
        schedule=ScheduleConfig(**_known(ScheduleConfig, stored["schedule"])),
    )
    before, now = learning_rate_of_next_step(earlier, state), learning_rate_of_next_step(config, taken_over)
    return RateChange(before, now, before / earlier.optimizer.learning_rate, now / config.optimizer.learning_rate)


def _known(schema: Any, values: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(schema)}
    return {key: value for key, value in values.items() if key in names}


def describe_resume(changes: dict[str, list[Any]], rate: RateChange | None, step: int) -> list[str]:
    """The lines that a resumed run prints of what is other than before."""
    lines = [f"changed    {key}: {written(old)} -> {written(new)}" for key, (old, new) in changes.items()]
    if rate is None:
        return lines
    if rate.before != rate.now:
        lines.append(f"rate       {rate.before:.3g} -> {rate.now:.3g} for the step after step {step}")
    if rate.rises or rate.decays_again:
        rises = "rises" if rate.rises else "is set back towards its peak"
        lines += [
            f"WARNING    the learning rate {rises} at step {step}: from {rate.before:.3g}, {rate.share_before:.0%} of "
            f"its peak, to {rate.now:.3g}, {rate.share_now:.0%}.",
            "           If you do not want that, stop, and go back to the values before or to a checkpoint from before",
            "           the decay (docs/guides/resume.md)",
        ]
    return lines
