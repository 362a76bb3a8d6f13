"""What ends a run."""

from __future__ import annotations

import os

from conf.passwords import without_passwords
from conf.problems import ConfigError


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


def last_words(error: Exception) -> str:
    """What a process of a run says of the error that it ends with; which one it is, where there are several."""
    rank = f"rank {os.environ.get('RANK', 0)}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    return without_passwords(f"train: {rank}{error}")


class UnfitDataError(ConfigError):
    """The corpus that the configuration names is missing or unfit, perhaps on one node only: each rank says so."""
