"""The models whose steps calibrations measure: those of conf/model/ with few blocks, all of one kind."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from model.config import ModelConfig
from model.presets import preset


@lru_cache
def model_of_steps(name: str, n_blocks: int, block: str | None) -> ModelConfig:
    """The preset `name` with so many blocks of the kind `block`; None: of the kind that it has without lists of others.

    Raises ConfigError where there is no such model.
    """
    changes: dict[str, Any] = {"n_blocks": n_blocks}
    if block is not None:
        # Settings of a kind that no block is of are refused.
        changes |= {"block": block, "slstm_at": [], "mlstm": None}
    return preset(name, **changes)
