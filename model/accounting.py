"""What a model costs, from its configuration alone: parameters, FLOPs of training and decoding, bytes of decoding.

Nothing is allocated, so a model of any size is described in milliseconds; model/memory.py does the same for memory.

FLOP convention (that of arXiv 2510.02228, appendix on FLOP counting): a multiply-add is 2 FLOPs; exp, log, sigmoid,
tanh, max, abs and a mask are 1 each; norms, residual additions, soft caps, rotary positions, biases and the embedding
look-up are left out; the backward pass costs twice the forward pass; what activation checkpointing computes a second
time does not count. The mLSTM counts every token pair of a chunk, attention the causal half of all pairs.
Axes: S sequence, L chunk, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from model.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters and tensors a model has; a tied head counts once."""

    total: int
    tensors: int
    # Group of parameters -> elements, in the order of the table that `describe` prints.
    groups: dict[str, int] = field(default_factory=dict)


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every parameter of LanguageModel(config), in its order. `config` must be valid."""
    shapes: dict[str, Shape] = {"embedding.weight": (config.vocab_size, config.d_model)}
    for index, kind in enumerate(config.block_kinds()):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in _block_shapes(config, kind)}
    shapes["out_norm.weight"] = (config.d_model,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.d_model)
    return shapes


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters by group, from `parameter_shapes`."""
    shapes = parameter_shapes(config)
    groups: dict[str, int] = {}
    for name, shape in shapes.items():
        group = _group(name)
        groups[group] = groups.get(group, 0) + math.prod(shape)
    ordered = {group: groups[group] for group, _ in _GROUPS if group in groups}
    return ParameterCount(total=sum(groups.values()), tensors=len(shapes), groups=ordered)


def forward_flops(config: ModelConfig, sequence_length: int, chunk_size: int | None = None) -> dict[str, float]:
    """FLOPs of one forward pass over one sequence, by component; their sum is the pass.

    Args:
        sequence_length: tokens of the sequence, S.
        chunk_size: L of the mLSTM's chunkwise form; null: the configuration's. It changes what the mLSTM computes.
    """
    flops: dict[str, float] = {}
    for kind in config.block_kinds():
        for component, count in _block_flops(config, kind, sequence_length, chunk_size).items():
            flops[component] = flops.get(component, 0.0) + count
    flops["head"] = 2.0 * sequence_length * config.d_model * config.vocab_size
    return flops


def training_flops_per_token(config: ModelConfig, sequence_length: int, chunk_size: int | None = None) -> float:
    """Forward and backward FLOPs of one token in a sequence of `sequence_length`: three times the forward pass."""
    return 3.0 * sum(forward_flops(config, sequence_length, chunk_size).values()) / sequence_length


def six_n_flops_per_token(config: ModelConfig) -> float:
    """The usual estimate 6N of a token's training FLOPs, with N all parameters, embedding included."""
    return 6.0 * count_parameters(config).total


def decoding_flops_per_token(config: ModelConfig, context: int = 0) -> float:
    """FLOPs of one decoding step of one sequence, with the recurrent form of each cell.

    Args:
        context: tokens already seen; only attention depends on it.
    """
    return sum(_decoding_block_flops(config, kind, context) for kind in config.block_kinds()) + (
        2.0 * config.d_model * config.vocab_size
    )


def decoding_bytes_per_step(
    config: ModelConfig, batch_size: int = 1, context: int = 0, weight_bytes: int = 2, state_bytes: int = 4
) -> float:
    """Bytes that one decoding step of a batch must move through memory: the floor of its time is this by the bandwidth.

    Every weight is read once (of the embedding, one row per sequence; a tied one is read whole, as the head); of every
    sequence the recurrent state is read and written, as are the convolutions' last inputs, and the key/value cache is
    read. The latter two have the dtype of the activations, which is that of the weights.
    """
    read_whole = count_parameters(config).total
    if not config.tie_embeddings:
        read_whole -= config.vocab_size * config.d_model
    state = state_elements(config)
    per_sequence = 2 * state_bytes * state["recurrent"] + weight_bytes * (
        config.d_model + 2 * state["convolution"] + context * state["cache_per_token"]
    )
    return float(weight_bytes * read_whole + batch_size * per_sequence)


def state_elements(config: ModelConfig) -> dict[str, int]:
    """Elements that one sequence carries from token to token.

    "recurrent": C, n and m of the mLSTM; h, c, n and m of the sLSTM. "convolution": the last K - 1 inputs of each
    convolution. "cache_per_token": keys and values of attention, for each token of the context.
    """
    elements = {"recurrent": 0, "convolution": 0, "cache_per_token": 0}
    for kind in config.block_kinds():
        if kind == "attention":
            attention = config.attention
            elements["cache_per_token"] += 2 * attention.n_kv_heads * (config.d_model // attention.n_heads)
        elif kind == "slstm":
            elements["recurrent"] += 4 * config.d_model
            elements["convolution"] += (config.slstm.conv_kernel_size - 1) * config.d_model
        else:
            heads, qk_head_dim, v_head_dim = mlstm_head_shape(config)
            elements["recurrent"] += heads * (qk_head_dim * v_head_dim + qk_head_dim + 1)
            if config.family == "neurips":
                elements["convolution"] += (config.preup_mlstm.conv_kernel_size - 1) * config.preup_dim
    return elements


def mlstm_head_shape(config: ModelConfig) -> tuple[int, int, int]:
    """(NH, DK, DV) of the mLSTM layers of `config`, of either family."""
    if config.family == "neurips":
        heads = config.preup_mlstm.n_heads
        return heads, config.preup_dim // heads, config.preup_dim // heads
    heads = config.mlstm.n_heads
    return heads, config.mlstm_qk_dim // heads, config.mlstm_v_dim // heads


def mlstm_chunk_size(config: ModelConfig) -> int:
    """L of the chunkwise form of the mLSTM layers of `config`, of either family."""
    return (config.preup_mlstm if config.family == "neurips" else config.mlstm).chunk_size


def mlstm_cell_flops(heads: int, qk_head_dim: int, v_head_dim: int, sequence_length: int, chunk_size: int) -> float:
    """FLOPs of the chunkwise mLSTM cell, forward, for one layer and sequence; a last chunk that is cut short counts so.

    Per head and chunk (arXiv 2510.02228): gate sums L(L+1)/2 + 2L; scalars of the state 5 + 5L; update of C and
    read-out through it 2 DK DV + 4L DK DV + 3L DK; update of n 2 DK + 4L DK; within the chunk L(L+1)/2 + 6L^2 + 2L +
    2L^2 (DK + DV + 2); combining both 7L + 2L DV.
    """
    whole, rest = divmod(sequence_length, chunk_size)
    per_head = whole * _chunk_flops(qk_head_dim, v_head_dim, chunk_size)
    if rest:
        per_head += _chunk_flops(qk_head_dim, v_head_dim, rest)
    return float(heads * per_head)


def _chunk_flops(dk: int, dv: int, length: int) -> float:
    gates = 0.5 * length * (length + 1) + 2 * length
    scalars = 5 + 5 * length
    memory = 2 * dk * dv + 4 * length * dk * dv + 3 * length * dk
    normaliser = 2 * dk + 4 * length * dk
    within = 0.5 * length * (length + 1) + 6 * length**2 + 2 * length + 2 * length**2 * (dk + dv + 2)
    combine = 7 * length + 2 * length * dv
    return gates + scalars + memory + normaliser + within + combine


# Group -> how the name of its parameters ends (within a block, behind the last "mixer."); the first match counts.
_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embedding", ("embedding.weight",)),
    ("norms", ("norm.weight",)),
    ("feed-forward", (".ffn.gate_proj.weight", ".ffn.up_proj.weight", ".ffn.down_proj.weight")),
    ("up and down projections", ("mixer.up_proj.weight", "mixer.down_proj.weight")),
    ("query and key", ("mixer.q_proj.weight", "mixer.k_proj.weight")),
    ("value, output gate, output", ("v_proj.weight", "output_gate.weight", "out_proj.weight")),
    ("gates", ("igate.weight", "igate.bias", "fgate.weight", "fgate.bias")),
    ("sLSTM gates", ("gate_proj.weight", "mixer.bias")),
    ("sLSTM recurrent kernel", ("recurrent_kernel",)),
    ("convolution and skip", ("conv.weight", "conv.bias", "learnable_skip")),
    ("head", ("lm_head.weight",)),
)


def _group(name: str) -> str:
    return next(group for group, endings in _GROUPS if name.endswith(endings))


def _block_shapes(config: ModelConfig, kind: str) -> Iterator[tuple[str, Shape]]:
    d_model = config.d_model
    yield "mixer_norm.weight", (d_model,)
    if kind == "attention":
        yield from _attention_shapes(config)
    elif kind == "slstm":
        yield from _slstm_shapes(config)
    elif config.family == "xlstm_7b":
        yield from _mlstm_shapes(config)
    else:
        yield from _preup_mlstm_shapes(config)
        return
    yield "ffn_norm.weight", (d_model,)
    if config.family == "xlstm_7b":
        yield "ffn.gate_proj.weight", (config.ffn_dim, d_model)
        yield "ffn.up_proj.weight", (config.ffn_dim, d_model)
    else:
        yield "ffn.up_proj.weight", (2 * config.ffn_dim, d_model)
    yield "ffn.down_proj.weight", (d_model, config.ffn_dim)


def _mlstm_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    d_model, heads, v_dim = config.d_model, config.mlstm.n_heads, config.mlstm_v_dim
    yield "mixer.q_proj.weight", (config.mlstm_qk_dim, d_model)
    yield "mixer.k_proj.weight", (config.mlstm_qk_dim, d_model)
    yield "mixer.v_proj.weight", (v_dim, d_model)
    yield "mixer.output_gate.weight", (v_dim, d_model)
    for gate in ("igate", "fgate"):
        yield f"mixer.{gate}.weight", (heads, d_model)
        yield f"mixer.{gate}.bias", (heads,)
    yield "mixer.head_norm.weight", (v_dim,)
    yield "mixer.out_proj.weight", (d_model, v_dim)


def _preup_mlstm_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    settings, width = config.preup_mlstm, config.preup_dim
    block = settings.qkv_block_size
    # Parameters of a module itself come before those of its children.
    yield "mixer.learnable_skip", (width,)
    yield "mixer.up_proj.weight", (2 * width, config.d_model)
    yield "mixer.conv.weight", (width, 1, settings.conv_kernel_size)
    yield "mixer.conv.bias", (width,)
    for projection in ("q_proj", "k_proj", "v_proj"):
        yield f"mixer.{projection}.weight", (width // block, block, block)
    for gate in ("igate", "fgate"):
        yield f"mixer.{gate}.weight", (settings.n_heads, 3 * width)
        yield f"mixer.{gate}.bias", (settings.n_heads,)
    yield "mixer.head_norm.weight", (width,)
    yield "mixer.down_proj.weight", (config.d_model, width)


def _slstm_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    settings, d_model = config.slstm, config.d_model
    head_dim = d_model // settings.n_heads
    yield "mixer.recurrent_kernel", (settings.n_heads, head_dim, 4, head_dim)
    yield "mixer.bias", (4, settings.n_heads, head_dim)
    yield "mixer.conv.weight", (d_model, 1, settings.conv_kernel_size)
    yield "mixer.conv.bias", (d_model,)
    for gate in ("igate_proj", "fgate_proj", "zgate_proj", "ogate_proj"):
        yield f"mixer.{gate}.weight", (settings.n_heads, head_dim, head_dim)
    yield "mixer.head_norm.weight", (d_model,)


def _attention_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    d_model = config.d_model
    kv_dim = config.attention.n_kv_heads * (d_model // config.attention.n_heads)
    yield "mixer.q_proj.weight", (d_model, d_model)
    yield "mixer.k_proj.weight", (kv_dim, d_model)
    yield "mixer.v_proj.weight", (kv_dim, d_model)
    yield "mixer.out_proj.weight", (d_model, d_model)


def _block_flops(config: ModelConfig, kind: str, length: int, chunk_size: int | None) -> dict[str, float]:
    flops = _linear_flops(config, kind, length)
    if kind == "attention":
        # Scores and values: half of 2 S^2 each; softmax: half of 5 S^2 per head.
        flops["attention"] = length**2 * (2.0 * config.d_model + 2.5 * config.attention.n_heads)
    elif kind == "slstm":
        flops["sLSTM cell"] = length * _slstm_step_flops(config)
    else:
        chunk = min(chunk_size or mlstm_chunk_size(config), length)
        flops["mLSTM cell"] = mlstm_cell_flops(*mlstm_head_shape(config), length, chunk)
    return flops


def _linear_flops(config: ModelConfig, kind: str, length: int) -> dict[str, float]:
    """Everything of a block but its cell: 2 FLOPs per weight of a matrix and token, and the gating products."""
    flops = {"projections": 0.0, "convolution": 0.0, "feed-forward": 0.0}
    for name, shape in _block_shapes(config, kind):
        if name.startswith("ffn."):
            flops["feed-forward"] += 2.0 * math.prod(shape)
        elif name == "mixer.conv.weight":
            flops["convolution"] += 2.0 * math.prod(shape) + shape[0]
        elif len(shape) > 1 and name not in ("mixer.recurrent_kernel", "mixer.bias"):
            flops["projections"] += 2.0 * math.prod(shape)
    has_ffn = not (kind == "mlstm" and config.family == "neurips")
    if has_ffn:
        flops["feed-forward"] += 2.0 * config.ffn_dim
        if kind == "mlstm":
            flops["projections"] += config.mlstm_v_dim
    else:
        # learnable_skip * a and the sum with it, SiLU(z) and the product with it.
        flops["projections"] += 4.0 * config.preup_dim
    return {component: count * length for component, count in flops.items() if count}


def _slstm_step_flops(config: ModelConfig) -> float:
    """One token of one layer (arXiv 2405.04517, equations 8 to 18).

    The recurrent products, and per cell 8 to add up the gates, 7 for m and both weights, 7 for c, n and h, and 3 for
    log sigmoid, tanh and sigmoid.
    """
    head_dim = config.d_model // config.slstm.n_heads
    return config.d_model * (8.0 * head_dim + 25.0)


def _decoding_block_flops(config: ModelConfig, kind: str, context: int) -> float:
    flops = sum(_linear_flops(config, kind, 1).values())
    if kind == "attention":
        return flops + (context + 1) * (4.0 * config.d_model + 5.0 * config.attention.n_heads)
    if kind == "slstm":
        return flops + _slstm_step_flops(config)
    heads, dk, dv = mlstm_head_shape(config)
    # Gates 9, update 4 DK DV, denominator 6 DK + DV + 3, read-out 2 DK DV + DK (arXiv 2510.02228).
    return flops + heads * (9 + 4 * dk * dv + 6 * dk + dv + 3 + 2 * dk * dv + dk)
