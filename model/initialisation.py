"""The first value of every parameter, as a pure function of the configuration, the parameter's name and a seed.

The rules are with the parameters, in each kind's file of model/layers. Sources: xLSTM-7B (arXiv 2503.13427) and its
published training configuration for the 7B family; xLSTM (arXiv 2405.04517) for the NeurIPS blocks and the sLSTM. A
parameter has the same values on every device, in every layout and for every number of processes, because each is drawn
by its own CPU generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig
from model.parameters import find_parameter
from model.stages import Stage


def initialise(model: Stage, seed: int) -> None:
    """Fill every parameter of `model`, or of a part of it, in place, in its own dtype and on its own device."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initialise_parameter(model.config, name, parameter.shape, seed))


def initialise_parameter(config: ModelConfig, name: str, tensor_shape: Sequence[int], seed: int) -> Tensor:
    """The initial value of parameter `name` (as in `LanguageModel.named_parameters`): float32, on the CPU.

    Raises ValueError for a name that no model has.
    """
    parameter = find_parameter(config, name)
    if parameter is None:
        raise ValueError(f"'{name}' is no parameter of an xlstm-pretrain model: there is no rule to initialise it")
    generator = torch.Generator().manual_seed(_parameter_seed(name, seed))
    return parameter.initial(tuple(tensor_shape), generator)


def _parameter_seed(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
