"""What a model costs, from its configuration alone: parameters, FLOPs of training and decoding, bytes of decoding.

Nothing is allocated, so a model of any size is described in milliseconds; model/memory.py does the same for memory.

FLOP convention (that of arXiv 2510.02228, appendix on FLOP counting): a multiply-add is 2 FLOPs; exp, log, sigmoid,
tanh, max, abs and a mask are 1 each; norms, residual additions, soft caps, rotary positions, biases and the embedding
look-up are left out; the backward pass costs twice the forward pass; what activation checkpointing computes a second
time does not count. The mLSTM counts every token pair of a chunk, attention the causal half of all pairs.
What a layer costs its kind says (model/layers). Axes: S sequence.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from model.config import ModelConfig
from model.hardware import Hardware
from model.initial_values import Shape
from model.layers import base, feed_forward, layer_kinds
from model.parameters import block_parameters, model_parameters, parameter_shapes
from model.parts import Part

__all__ = [
    "ParameterCount",
    "Shape",
    "count_parameters",
    "decoding_bytes_per_step",
    "decoding_flops_per_token",
    "forward_flops",
    "parameter_shapes",
    "six_n_flops_per_token",
    "state_elements",
    "training_flops_per_token",
]

REFERENCE = Hardware()


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters and tensors a model has; a tied head counts once."""

    total: int
    tensors: int
    # Group of parameters -> elements, in the order of the table that `describe` prints.
    groups: dict[str, int] = field(default_factory=dict)


def count_parameters(config: ModelConfig, part: Part | None = None) -> ParameterCount:
    """Parameters by group, of the model or of a part of it."""
    part = part or Part.whole(config)
    ends = model_parameters(config, Part(range(0), part.embedding, part.head))
    several = [(1, ends), *((count, block_parameters(config, index)) for index, count in _like_blocks(config, part))]
    groups: dict[str, int] = {}
    for count, parameters in several:
        for parameter in parameters.values():
            groups[parameter.group] = groups.get(parameter.group, 0) + count * math.prod(parameter.shape)
    others = [group for group in groups if group not in base.GROUPS]
    *first, head = base.GROUPS
    ordered = {group: groups[group] for group in (*first, *others, head) if group in groups}
    tensors = sum(count * len(parameters) for count, parameters in several)
    return ParameterCount(total=sum(groups.values()), tensors=tensors, groups=ordered)


def _like_blocks(config: ModelConfig, part: Part) -> list[tuple[int, int]]:
    """(its first block in `part`, how many blocks) of each kind: blocks of one kind are alike."""
    kinds = [config.block_kinds()[index] for index in part.blocks]
    return [(part.blocks[kinds.index(kind)], kinds.count(kind)) for kind in dict.fromkeys(kinds)]


def forward_flops(
    config: ModelConfig, sequence_length: int, hardware: Hardware = REFERENCE, part: Part | None = None
) -> dict[str, float]:
    """FLOPs of one forward pass over one sequence, by component; their sum is the pass.

    Args:
        sequence_length: tokens of the sequence, S.
        hardware: where it runs: the kernels of a GPU cut the mLSTM in other chunks, which changes what it computes. The
            published counts are those of the default.
        part: of the model; None: all.
    """
    part = part or Part.whole(config)
    kinds = layer_kinds(config)
    flops: dict[str, float] = {}
    for index, blocks in _like_blocks(config, part):
        count = _product_flops(config, index, sequence_length)
        for component, others in kinds[index].forward_flops(config, sequence_length, hardware).items():
            count[component] = count.get(component, 0.0) + others
        for component, added in count.items():
            if added:
                flops[component] = flops.get(component, 0.0) + blocks * added
    if part.head:
        flops[base.HEAD] = 2.0 * sequence_length * config.d_model * config.vocab_size
    return flops


def training_flops_per_token(
    config: ModelConfig, sequence_length: int, hardware: Hardware = REFERENCE, part: Part | None = None
) -> float:
    """Forward and backward FLOPs of one token in a sequence of `sequence_length`: three times the forward pass."""
    return 3.0 * sum(forward_flops(config, sequence_length, hardware, part).values()) / sequence_length


def six_n_flops_per_token(config: ModelConfig) -> float:
    """The usual estimate 6N of a token's training FLOPs, with N all parameters, embedding included."""
    return 6.0 * count_parameters(config).total


def decoding_flops_per_token(config: ModelConfig, context: int = 0) -> float:
    """FLOPs of one decoding step of one sequence, with the recurrent form of each cell.

    Args:
        context: tokens already seen; only attention depends on it.
    """
    blocks = 0.0
    for index, kind in enumerate(layer_kinds(config)):
        blocks += sum(_product_flops(config, index, 1).values()) + kind.decoding_flops(config, context)
    return blocks + 2.0 * config.d_model * config.vocab_size


def decoding_bytes_per_step(
    config: ModelConfig, batch_size: int = 1, context: int = 0, weight_bytes: int = 2, state_bytes: int = 4
) -> float:
    """Bytes that one decoding step of a batch must move through memory: the floor of its time is this by the bandwidth.

    Every weight is read once (of the embedding, one row per sequence; a tied one is read whole, as the head); of every
    sequence the recurrent state is read and written, as are the convolutions' last inputs, and the key/value cache is
    read, that of a window whole. The latter two have the dtype of the activations, which is that of the weights.
    """
    read_whole = count_parameters(config).total
    if not config.tie_embeddings:
        read_whole -= config.vocab_size * config.d_model
    state = state_elements(config)
    per_sequence = 2 * state_bytes * state["recurrent"] + weight_bytes * (
        config.d_model + 2 * state["convolution"] + state["window"] + context * state["cache_per_token"]
    )
    return float(weight_bytes * read_whole + batch_size * per_sequence)


def state_elements(config: ModelConfig) -> dict[str, int]:
    """Elements that one sequence carries from token to token.

    "recurrent": C, n and m of the mLSTM; h, c, n and m of the sLSTM; the memory of a linear recurrence. "convolution":
    the last K - 1 inputs of each convolution. "window": keys and values of attention in a window. "cache_per_token":
    keys and values of attention without one, for each token of the context.
    """
    elements = {"recurrent": 0, "convolution": 0, "window": 0, "cache_per_token": 0}
    for kind in layer_kinds(config):
        for name, count in asdict(kind.state_elements(config)).items():
            elements[name] += count
    return elements


def _product_flops(config: ModelConfig, index: int, tokens: int) -> dict[str, float]:
    """2 FLOPs per weight of a matrix and token in block `index`, and what its feed-forward layer does besides."""
    flops = {base.PROJECTIONS: 0.0, base.CONVOLUTION_FLOPS: 0.0, base.FEED_FORWARD_FLOPS: 0.0}
    for parameter in block_parameters(config, index).values():
        if parameter.product is not None:
            flops[parameter.product] = flops.get(parameter.product, 0.0) + 2.0 * tokens * math.prod(parameter.shape)
    if flops[base.FEED_FORWARD_FLOPS]:
        flops[base.FEED_FORWARD_FLOPS] += tokens * feed_forward.token_flops(config)
    return flops
