"""The suites that there are, by the `kind` of their settings, and how their settings are composed."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from conf import CONF_DIR, ConfigError, compose, suggestion
from train.evaluate.suites.base import Suite
from train.evaluate.suites.downstream import DownstreamSuite
from train.evaluate.suites.length import LengthSuite
from train.evaluate.suites.needle import NeedleSuite
from train.evaluate.suites.task import TaskSuite

_SUITES: tuple[Suite[Any], ...] = (TaskSuite(), NeedleSuite(), LengthSuite(), DownstreamSuite())


def suite_of(kind: str) -> Suite[Any]:
    """The suite that settings of this `kind` are for. Raises ConfigError."""
    for suite in _SUITES:
        if suite.kind == kind:
            return suite
    kinds = [suite.kind for suite in _SUITES]
    raise ConfigError([f"suite.kind: no such suite ({kind!r}){suggestion(kind, kinds)}; choose one of {kinds}"])


def all_suites() -> tuple[Suite[Any], ...]:
    """Every kind."""
    return _SUITES


def schema_of(suite: Suite[Any]) -> Any:
    """What conf/suite.yaml composes for one of its kind: each has settings of its own."""
    return dataclasses.make_dataclass("SuiteConfig", [("suite", suite.settings_class)], frozen=True)


def suite_names() -> list[str]:
    """What `suite` may be: the files of conf/suite/."""
    return sorted(path.stem for path in (CONF_DIR / "suite").glob("*.yaml"))


def suite_named(name: str) -> Suite[Any]:
    """The suite that conf/suite/`name`.yaml is for. Raises ConfigError."""
    if name not in suite_names():
        raise ConfigError(
            [
                f"suite={name}: conf/suite/ has no such file{suggestion(name, suite_names())}; choose one of "
                f"{', '.join(suite_names())}"
            ]
        )
    return suite_of(yaml.safe_load((CONF_DIR / "suite" / f"{name}.yaml").read_text())["kind"])


def compose_suite(name: str, overrides: list[str]) -> tuple[Suite[Any], Any]:
    """The suite of conf/suite/`name`.yaml, and its settings with `overrides` of keys below `suite`.

    Raises ConfigError with every problem of both.
    """
    suite = suite_named(name)
    settings = compose(
        schema_of(suite), "suite", [f"suite={name}", *overrides], lambda built: suite.validate(built.suite)
    ).suite
    if settings.kind != suite.kind:
        raise ConfigError([f"suite.kind: conf/suite/{name}.yaml is of kind {suite.kind}; set suite=NAME for another"])
    if problems := suite.validate(settings):
        raise ConfigError(problems)
    return suite, settings
