"""Memory of training and decoding, from a model's configuration alone.

The activations are those that the layers of this package keep for the backward pass with the mLSTM's reference backend
and fused norms (as on a GPU). c is the bytes of the compute dtype (bf16: 2, fp32: 4). Bytes per token of each half of a
block, with D model width, F feed-forward width, K convolution kernel, L chunk, NH heads, QK and V the total query and
value widths, DK and DV those of a head, E the inner width of the NeurIPS mLSTM:

    mLSTM (7B)      c (2D + 3V) + u D + 8V + cell(QK, V)                     u = 4 for bf16, else 0: fp32 gate inputs
    mLSTM (NeurIPS) c (2D + 7E) + (4K + 20) E + cell(E, E)
    cell(QK, V)     24 QK + 8 (V + NH) + 12 NH L + 8 NH DK (DV + 1) / L
    sLSTM           4 c D + (48 + 4K) D
    attention       c (4D + 2 KV) + 8 D / NH + c S        KV: total width of the keys; the last term: the document mask
    SwiGLU          c (2D + 4F);    gated GELU: the same
    head            2 c D, and once (8 + c) V for each of at most 2048 tokens of the chunk of logits in work

Temporaries of a single operation, gradients of activations and the allocator's fragmentation are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.accounting import count_parameters, mlstm_chunk_size, mlstm_head_shape, state_elements
from model.config import ModelConfig

LOSS_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class TrainingStateBytes:
    """Bytes of one rank that last for the whole run."""

    weights: float
    gradients: float
    # fp32 master weights and AdamW's two moments.
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def training_state_bytes(
    config: ModelConfig, zero_stage: int, ranks: int, compute_bytes: int = 2, gradient_bytes: int = 4
) -> TrainingStateBytes:
    """Weights, gradients and optimizer state of one rank under ZeRO (arXiv 1910.02054).

    Stage 0 shards nothing, 1 the optimizer state, 2 also the gradients, 3 also the weights, evenly over `ranks`.
    Gradients are summed over micro-batches in fp32 (`gradient_bytes` 4). Stage 3's gathered layers, which come and go,
    are not in it.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage must be 0, 1, 2 or 3, not {zero_stage}")
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, not {ranks}")
    parameters = count_parameters(config).total
    return TrainingStateBytes(
        weights=parameters * compute_bytes / (ranks if zero_stage == 3 else 1),
        gradients=parameters * gradient_bytes / (ranks if zero_stage >= 2 else 1),
        optimizer=parameters * 12 / (ranks if zero_stage >= 1 else 1),
    )


def activation_bytes(
    config: ModelConfig,
    micro_batch_size: int,
    sequence_length: int,
    activation_checkpointing: str = "none",
    compute_bytes: int = 2,
    chunk_size: int | None = None,
) -> float:
    """Bytes of activations at the peak of one micro-batch, from the formula in this module's docstring.

    "none" keeps all of them. "unit" keeps the input of each half of a block (c D per token) and, at the peak, all of
    the largest half. "block" keeps the input of each block and, at the peak, all of the largest block.
    """
    tokens = micro_batch_size * sequence_length
    chunk = min(chunk_size or _chunk_size(config), sequence_length)
    blocks = [
        (_mixer_bytes(config, kind, compute_bytes, chunk, sequence_length), _ffn_bytes(config, kind, compute_bytes))
        for kind in config.block_kinds()
    ]
    unit_input = compute_bytes * config.d_model
    if activation_checkpointing == "none":
        per_token = sum(mixer + ffn for mixer, ffn in blocks)
    elif activation_checkpointing == "unit":
        per_token = sum(unit_input * (2 if ffn else 1) for _, ffn in blocks) + max(max(block) for block in blocks)
    elif activation_checkpointing == "block":
        per_token = unit_input * len(blocks) + max(mixer + ffn for mixer, ffn in blocks)
    else:
        raise ValueError(
            f"activation_checkpointing: unknown mode {activation_checkpointing!r}; choose one of none, unit, block"
        )
    head = 2 * compute_bytes * config.d_model * tokens
    logits = (8 + compute_bytes) * config.vocab_size * min(tokens, LOSS_CHUNK_TOKENS)
    return float(per_token * tokens + head + logits)


def state_bytes(config: ModelConfig, context: int = 0, state_dtype_bytes: int = 4, cache_dtype_bytes: int = 2) -> int:
    """Bytes that one sequence needs while it is decoded: recurrent states and, for attention, `context` cached tokens.

    The convolutions' last inputs count with the cache's dtype, that of the activations. The copies of the normaliser in
    a state that decoding overwrites (kernels.mlstm.step), about 3 % of the memory, are not in it.
    """
    elements = state_elements(config)
    cached = elements["convolution"] + context * elements["cache_per_token"]
    return state_dtype_bytes * elements["recurrent"] + cache_dtype_bytes * cached


def _chunk_size(config: ModelConfig) -> int:
    return mlstm_chunk_size(config) if "mlstm" in config.block_kinds() else 1


def _mixer_bytes(config: ModelConfig, kind: str, c: int, chunk: int, sequence_length: int) -> float:
    d_model = config.d_model
    if kind == "attention":
        kv_dim = config.attention.n_kv_heads * (d_model // config.attention.n_heads)
        return c * (4 * d_model + 2 * kv_dim) + 8 * d_model / config.attention.n_heads + c * sequence_length
    if kind == "slstm":
        return 4 * c * d_model + (48 + 4 * config.slstm.conv_kernel_size) * d_model
    if config.family == "xlstm_7b":
        v_dim = config.mlstm_v_dim
        gate_input = 4 * d_model if c < 4 else 0
        return c * (2 * d_model + 3 * v_dim) + gate_input + 8 * v_dim + _cell_bytes(config, chunk)
    width = config.preup_dim
    outside = (4 * config.preup_mlstm.conv_kernel_size + 20) * width
    return c * (2 * d_model + 7 * width) + outside + _cell_bytes(config, chunk)


def _cell_bytes(config: ModelConfig, chunk: int) -> float:
    heads, dk, dv = mlstm_head_shape(config)
    tokens_part = 24 * heads * dk + 8 * heads * (dv + 1) + 12 * heads * chunk
    return tokens_part + 8 * heads * dk * (dv + 1) / chunk


def _ffn_bytes(config: ModelConfig, kind: str, c: int) -> float:
    if kind == "mlstm" and config.family == "neurips":
        return 0.0
    return c * (2 * config.d_model + 4 * config.ffn_dim)
