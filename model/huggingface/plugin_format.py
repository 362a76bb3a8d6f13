"""Our own format for transformers: holds every model; the classes of model/huggingface/plugin.py compute it there.

config.json has the configuration as model.json has it, in its section "model"; tensors have our names. A few lines of
Python beside it find those classes where a program trusts the folder's code instead of registering them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from conf.problems import other_format
from model.config import ModelConfig
from model.huggingface.base import CONFIG, Format, HuggingFaceError, Tensors
from model.weights import WeightsError, build_model_config

MODEL_TYPE = "xlstm_pretrain"
FORMAT_VERSION = 1
CONFIG_CLASS = "XLSTMPretrainConfig"
MODEL_CLASS = "XLSTMPretrainForCausalLM"
# Of our parameters, in the class that wraps the model.
PREFIX = "model."
_CODE_MODULE = "modeling_xlstm_pretrain"
# transformers looks for what such a file imports, and would say to install `model`; what is tried it leaves alone.
_CODE = f"""\
try:
    from model.huggingface.plugin import {CONFIG_CLASS}, {MODEL_CLASS}
except ImportError as error:
    raise ImportError(f"this model needs xlstm-pretrain ({{error}}): pip install xlstm-pretrain") from error
"""


class PluginFormat(Format):
    name = "xlstm-pretrain"
    model_type = MODEL_TYPE
    ties_head = True
    files = {f"{_CODE_MODULE}.py": _CODE}

    def is_for(self, config: ModelConfig) -> bool:
        # It is written where it is asked for.
        return False

    def inexpressible(self, config: ModelConfig) -> list[str]:
        return []

    def config_json(self, config: ModelConfig, dtype: torch.dtype, sequence_length: int | None) -> dict[str, Any]:
        # Programs take it for the longest text.
        length = {} if sequence_length is None else {"max_position_embeddings": sequence_length}
        return {
            "architectures": [MODEL_CLASS],
            "model_type": MODEL_TYPE,
            "auto_map": auto_map(),
            "format_version": FORMAT_VERSION,
            "model": dataclasses.asdict(config),
            **usual_values(config),
            **length,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def unreadable(self, values: dict[str, Any]) -> list[str]:
        if problem := other_format(Path(CONFIG), values.get("format_version"), FORMAT_VERSION):
            return [problem]
        section = values.get("model")
        if not isinstance(section, dict):
            return ["it has no section 'model'"]
        plugins = section.get("plugins")
        names = plugins if isinstance(plugins, list) else []
        # A folder that was downloaded says which modules; one of them may lie in it.
        return [
            f"model.plugins names {name!r}: import it in your program first; nothing that such a folder names is run"
            for name in names
            if name not in sys.modules
        ]

    def model_config(self, directory: Path, values: dict[str, Any], tensors: Tensors) -> ModelConfig:
        try:
            config = build_model_config(values["model"], directory / CONFIG)
        except WeightsError as error:
            raise HuggingFaceError(
                f"{directory / CONFIG} describes a model that cannot be used", [str(error)]
            ) from None
        reasons = [
            f"{key} is {values[key]}, but the section 'model' says {value}: change it there"
            for key, value in usual_values(config).items()
            if values.get(key, value) != value
        ]
        if reasons:
            raise HuggingFaceError(f"{directory / CONFIG} contradicts itself", reasons)
        return config

    def tensor_layout(self, names: Iterable[str], values: dict[str, Any]) -> dict[str, list[str]]:
        return {f"{PREFIX}{name}": [name] for name in names}


PLUGIN = PluginFormat()


def model_of(values: dict[str, Any], directory: Path) -> ModelConfig:
    """The model that `values`, a config.json of this format in `directory`, describes. Raises HuggingFaceError."""
    if reasons := PLUGIN.unreadable(values):
        raise HuggingFaceError(f"{directory / CONFIG} describes a model that cannot be used", reasons)
    return PLUGIN.model_config(directory, values, {})


def usual_values(config: ModelConfig) -> dict[str, Any]:
    """What programs look for in every config.json, by the names that they know."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_blocks,
        "tie_word_embeddings": config.tie_embeddings,
    }


def auto_map() -> dict[str, str]:
    """Where transformers finds the classes when it may run the folder's code."""
    return {
        "AutoConfig": f"{_CODE_MODULE}.{CONFIG_CLASS}",
        "AutoModelForCausalLM": f"{_CODE_MODULE}.{MODEL_CLASS}",
    }
