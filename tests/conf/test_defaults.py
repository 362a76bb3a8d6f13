"""A default stands in the dataclass and in the YAML that a command composes: the two agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from conf import compose
from train.config import RunConfig

GIVEN = ["name=x", "corpus.directory=y", "training.total_steps=1"]
# What the command line must give, what a model's file decides, the sets of an evaluation and the rules of alerts: the
# library has none.
DECIDED_ELSEWHERE = {"name", "corpus.directory", "training.total_steps", "model", "evaluation.sets", "alerts.rules"}


def differences(composed: Any, default: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(composed):
        key, ours, usual = f"{prefix}{field.name}", getattr(composed, field.name), getattr(default, field.name)
        if key in DECIDED_ELSEWHERE:
            continue
        if dataclasses.is_dataclass(ours) and dataclasses.is_dataclass(usual):
            yield from differences(ours, usual, f"{key}.")
        elif ours != usual:
            yield f"{key}: YAML {ours!r}, dataclass {usual!r}"


def test_a_run_has_the_same_defaults_in_yaml_and_in_its_dataclasses():
    assert list(differences(compose(RunConfig, "train", [*GIVEN, "recipe=none"]), RunConfig())) == []


def test_a_difference_is_found():
    changed = compose(RunConfig, "train", [*GIVEN, "recipe=none", "checkpoint.keep_last=7", "seed=3"])
    assert list(differences(changed, RunConfig())) == [
        "seed: YAML 3, dataclass 0",
        "checkpoint.keep_last: YAML 7, dataclass 3",
    ]
