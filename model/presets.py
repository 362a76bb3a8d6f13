"""The models of conf/model/ by name, for programs and notebooks."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf import CONF_DIR, ConfigError, suggestion, to_dataclass
from model.config import ModelConfig, validate_model


def preset_names() -> list[str]:
    """What `preset` knows."""
    return sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml"))


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of conf/model/<name>.yaml, with values of your own.

    Args:
        name: xlstm_7b, xlstm_160m, tiny, ... (`preset_names`).
        overrides: values by key. Those of a section are a dictionary, and the others of the section stay.

    Returns:
        a valid configuration; `LanguageModel(config)` makes the model.

    Raises:
        ConfigError: no such preset, or values that do not work, with every problem.

    Example:
        preset("xlstm_160m", n_blocks=6, mlstm={"n_heads": 8})
    """
    path = CONF_DIR / "model" / f"{name}.yaml"
    if not path.is_file():
        known = preset_names()
        raise ConfigError([f"no preset '{name}'{suggestion(name, known)}; there are {', '.join(known)}"])
    tree = OmegaConf.merge(OmegaConf.load(path), overrides)
    assert isinstance(tree, DictConfig)
    config = to_dataclass(ModelConfig, tree)
    problems = validate_model(config)
    if problems:
        raise ConfigError(problems)
    return config
