"""The first value of every parameter, as a pure function of the configuration, the parameter's name and a seed.

Sources: xLSTM-7B (arXiv 2503.13427) and its published training configuration for the 7B family; xLSTM
(arXiv 2405.04517) for the NeurIPS blocks and the sLSTM. A parameter has the same values on every device, in every
layout and for every number of processes, because each is drawn by its own CPU generator.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig
from model.language_model import LanguageModel

FGATE_BIAS_RANGE = (3.0, 6.0)
NEURIPS_IGATE_BIAS_STD = 0.1
_SLSTM_FORGET_SLOT = 1
_PLACE = {"device": "cpu", "dtype": torch.float32}


def initialise(model: LanguageModel, seed: int) -> None:
    """Fill every parameter of `model` in place, in its own dtype and on its own device."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initialise_parameter(model.config, name, parameter.shape, seed))


def initialise_parameter(config: ModelConfig, name: str, tensor_shape: Sequence[int], seed: int) -> Tensor:
    """The initial value of parameter `name` (as in `LanguageModel.named_parameters`): float32, on the CPU.

    Raises ValueError for a name that no model has.
    """
    shape = tuple(tensor_shape)
    generator = torch.Generator().manual_seed(_parameter_seed(name, seed))
    owner, _, leaf = name.rpartition(".")
    layer = owner.rpartition(".")[2]

    def normal(std: float) -> Tensor:
        return torch.empty(shape, **_PLACE).normal_(0.0, std, generator=generator)

    if layer.endswith("norm") or leaf == "learnable_skip":
        return torch.ones(shape, **_PLACE)
    if layer in ("igate", "fgate"):
        return _gate(config, layer, leaf, shape, normal)
    if layer == "output_gate" or leaf == "recurrent_kernel":
        return torch.zeros(shape, **_PLACE)
    if layer == "mixer" and leaf == "bias":
        return slstm_bias(shape, _block_index(name), config.n_blocks)
    if layer == "conv":
        # The uniform distribution that PyTorch's own convolutions start from.
        bound = _conv_kernel_size(config, name) ** -0.5
        return torch.empty(shape, **_PLACE).uniform_(-bound, bound, generator=generator)
    if layer in ("out_proj", "down_proj"):
        return normal(wang_std(config))
    if layer in ("embedding", "lm_head") or layer.endswith("_proj"):
        return normal(small_std(config))
    raise ValueError(f"'{name}' is no parameter of an xlstm-pretrain model: there is no rule to initialise it")


def small_std(config: ModelConfig) -> float:
    """sqrt(2 / (5 d_model)), for every map that reads the residual stream (Nguyen & Salazar, arXiv 1910.05895)."""
    return math.sqrt(2 / (5 * config.d_model))


def wang_std(config: ModelConfig) -> float:
    """2 / (n_blocks sqrt(d_model)), for every map that writes to the residual stream; d_model whatever its input."""
    return 2 / (config.n_blocks * math.sqrt(config.d_model))


def slstm_bias(shape: tuple[int, ...], block_index: int, n_blocks: int) -> Tensor:
    """[4, NH, DH]: zeros, but the forget gate has 5 - 12 (j / (DH - 1))^(0.3 + 1.3 l / (NB - 1)) at unit j, block l."""
    bias = torch.zeros(shape, **_PLACE)
    exponent = 0.3 + 1.3 * block_index / max(n_blocks - 1, 1)
    unit = torch.linspace(0, 1, shape[-1], dtype=torch.float64, device="cpu")
    bias[_SLSTM_FORGET_SLOT] = (5 - 12 * unit**exponent).float()
    return bias


def _gate(config: ModelConfig, layer: str, leaf: str, shape: tuple[int, ...], normal) -> Tensor:
    """Zero weights; forget biases spread over the heads, the input bias of the family."""
    if leaf == "weight":
        return torch.zeros(shape, **_PLACE)
    if layer == "fgate":
        return torch.linspace(*FGATE_BIAS_RANGE, shape[0], **_PLACE)
    if config.family == "xlstm_7b":
        return torch.full(shape, config.mlstm.igate_bias_init, **_PLACE)
    return normal(NEURIPS_IGATE_BIAS_STD)


def _conv_kernel_size(config: ModelConfig, name: str) -> int:
    kind = config.block_kinds()[_block_index(name)]
    return (config.slstm if kind == "slstm" else config.preup_mlstm).conv_kernel_size


def _block_index(name: str) -> int:
    return int(name.split(".")[1])


def _parameter_seed(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
