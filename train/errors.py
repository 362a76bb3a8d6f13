"""What ends a run."""

from __future__ import annotations

from conf.problems import ConfigError


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class UnfitDataError(ConfigError):
    """The corpus that the configuration names is missing or unfit, perhaps on one node only: each rank says so."""
