"""Every parameter of a model, from its configuration alone: name, shape, group and first value.

What a checkpoint must hold, what a rank of any layout fills, and what a model costs follow from this table. No module
is made for it.
"""

from __future__ import annotations

from model.config import ModelConfig
from model.initial_values import Shape, constant, reads_stream
from model.layers import base, feed_forward, layer_kind
from model.layers.base import Parameter
from model.parts import Part


def model_parameters(config: ModelConfig, part: Part | None = None) -> dict[str, Parameter]:
    """Name -> parameter of Stage(config, part), in its order; without a part of the whole LanguageModel(config).

    A parameter has the same name whichever part holds it. `config` must be valid. Of a model whose head is tied to the
    embedding, every part with an end holds embedding.weight, and a part with the head has no lm_head.weight.
    """
    part = part or Part.whole(config)
    vocabulary = (config.vocab_size, config.d_model)
    parameters: dict[str, Parameter] = {}
    if part.embedding or (part.head and config.tie_embeddings):
        parameters["embedding.weight"] = Parameter(vocabulary, base.EMBEDDING, reads_stream(config))
    for index in part.blocks:
        block = block_parameters(config, index)
        parameters |= {f"blocks.{index}.{name}": parameter for name, parameter in block.items()}
    if part.head:
        parameters["out_norm.weight"] = _norm(config)
        if not config.tie_embeddings:
            parameters["lm_head.weight"] = Parameter(vocabulary, base.HEAD, reads_stream(config))
    return parameters


def block_parameters(config: ModelConfig, index: int) -> dict[str, Parameter]:
    """The parameters of one block by their names in it."""
    kind = layer_kind(config, config.block_kinds()[index])
    mixer = kind.parameters(config, index)
    parameters = {"mixer_norm.weight": _norm(config)}
    parameters |= {f"mixer.{name}": parameter for name, parameter in mixer.items()}
    if kind.has_feed_forward:
        parameters["ffn_norm.weight"] = _norm(config)
        parameters |= {f"ffn.{name}": parameter for name, parameter in feed_forward.parameters(config).items()}
    return parameters


def parameter_shapes(config: ModelConfig, part: Part | None = None) -> dict[str, Shape]:
    """Name -> shape of every parameter, as in `model_parameters`."""
    return {name: parameter.shape for name, parameter in model_parameters(config, part).items()}


def find_parameter(config: ModelConfig, name: str) -> Parameter | None:
    """The parameter `name` of the whole model or of any part; None: there is none."""
    if not name.startswith("blocks."):
        # A model without blocks has the same ends.
        return model_parameters(config, Part(range(0), embedding=True, head=True)).get(name)
    _, number, rest = name.split(".", 2)
    if not number.isdecimal() or int(number) >= config.n_blocks:
        return None
    return block_parameters(config, int(number)).get(rest)


def _norm(config: ModelConfig) -> Parameter:
    return Parameter((config.d_model,), base.NORMS, constant(1.0))
