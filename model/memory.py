"""Memory of training and decoding, from a model's configuration alone.

The activations are those that the layers of this package keep for the backward pass with fused norms (as on a GPU); a
layer's kind says how many (model/layers). c is the bytes of the compute dtype (bf16: 2, fp32: 4). Bytes per token of
each half of a block, with D model width, F feed-forward width, K convolution kernel, L chunk, NH heads, QK and V the
total query and value widths, DK and DV those of a head, E the inner width of the NeurIPS mLSTM:

    mLSTM (7B)      c (2D + 3V) + u D + cell(QK, V)       u = 4 for bf16 on a CPU, else 0: fp32 gate inputs
    mLSTM (NeurIPS) c (2D + 7E) + (4K + g) E + cell(E, E)             g = 3c on a GPU, else 12: gate inputs
    cell(QK, V)     kernels: c (2 QK + V) + 40 NH + 4 NH / L + NH DK (c DV + 4) / L;
                    reference: 24 QK + 16 V + 8 NH + 12 NH L + 8 NH DK (DV + 1) / L
    sLSTM           kernels: ((4 + k) c + 4K + 4 + u') D, k = 8 with a soft cap, else 7: numbers of each unit;
                    u' = 8 for bf16, else 0: fp32 gate inputs; reference and loop: (4 c + 4K + 48) D
    attention       c (4D + 2 KV) + 8 D / NH + c S        KV: total width of the keys; the last term: the document mask
    SwiGLU          c (2D + 4F);    gated GELU: the same
    head            2 c D, and once (8 + c) V for each of at most 2048 tokens of the chunk of logits in work

Temporaries of a single operation, gradients of activations and the allocator's fragmentation are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.accounting import REFERENCE, count_parameters, state_elements
from model.config import ModelConfig
from model.hardware import Hardware
from model.layers import feed_forward, layer_kinds
from model.parts import Part
from model.recomputation import ACTIVATION_CHECKPOINTING, unknown_mode

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
    config: ModelConfig,
    zero_stage: int,
    ranks: int,
    compute_bytes: int = 2,
    gradient_bytes: int = 4,
    part: Part | None = None,
) -> TrainingStateBytes:
    """Weights, gradients and optimizer state of one rank under ZeRO (arXiv 1910.02054).

    Stage 0 shards nothing, 1 the optimizer state, 2 also the gradients, 3 also the weights, evenly over `ranks`.
    Gradients are summed over micro-batches in fp32 (`gradient_bytes` 4). Stage 3's gathered layers, which come and go,
    are not in it. `part`: of the model, which these ranks share; None: all.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage must be 0, 1, 2 or 3, not {zero_stage}")
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, not {ranks}")
    parameters = count_parameters(config, part).total
    return TrainingStateBytes(
        weights=parameters * compute_bytes / (ranks if zero_stage == 3 else 1),
        gradients=parameters * gradient_bytes / (ranks if zero_stage >= 2 else 1),
        optimizer=parameters * 12 / (ranks if zero_stage >= 1 else 1),
    )


@dataclass(frozen=True)
class InWork:
    """How much of its micro-batches a rank has in work at once.

    Attributes:
        sequence_ranks: ranks that share each sequence. Beside its share of the tokens, each keeps the state that enters
            its slice, of every block in float32.
        time_chunk: tokens of each sequence that are trained at a time; None: all. Their activations alone are kept, and
            thrice the state, as it enters and leaves and its gradient; an attention's state has all tokens.
        micro_batches: those, or their time chunks, whose backward pass is still to come, as in a pipeline. Each keeps
            what it has to, a time chunk also the state that enters it; the largest half or block, and the logits, are
            those of one.
    """

    sequence_ranks: int = 1
    time_chunk: int | None = None
    micro_batches: int = 1


def activation_bytes(
    config: ModelConfig,
    micro_batch_size: int,
    sequence_length: int,
    activation_checkpointing: str = "none",
    hardware: Hardware = REFERENCE,
    part: Part | None = None,
    in_work: InWork | None = None,
) -> float:
    """Bytes of activations at the peak of one micro-batch, from the formula in this module's docstring.

    "none" keeps all of them. "unit" keeps the input of each half of a block (c D per token) and, at the peak, all of
    the largest half. "block" keeps the input of each block and, at the peak, all of the largest block.

    Args:
        micro_batch_size: sequences.
        sequence_length: tokens of each.
        activation_checkpointing: one of model.recomputation.ACTIVATION_CHECKPOINTING.
        hardware: where it runs and in which precision; the default is the reference in bf16.
        part: of the model, as a stage holds it; None: all.
        in_work: how much of a micro-batch a rank has at once; None: all of one.

    Raises:
        ValueError: an unknown activation_checkpointing.
    """
    if activation_checkpointing not in ACTIVATION_CHECKPOINTING:
        raise ValueError(unknown_mode(activation_checkpointing))
    part = part or Part.whole(config)
    in_work = in_work or InWork()
    length = min(sequence_length, in_work.time_chunk or sequence_length)
    tokens = micro_batch_size * length // in_work.sequence_ranks
    kinds = layer_kinds(config)
    blocks = [
        (
            kinds[index].activation_bytes(config, sequence_length, hardware),
            feed_forward.activation_bytes(config, hardware) if kinds[index].has_feed_forward else 0.0,
        )
        for index in part.blocks
    ]
    unit_input = hardware.compute_bytes * config.d_model
    largest = 0.0
    if activation_checkpointing == "none":
        kept = sum(mixer + ffn for mixer, ffn in blocks)
    elif activation_checkpointing == "unit":
        largest = max((max(block) for block in blocks), default=0.0)
        kept = sum(unit_input * (2 if ffn else 1) for _, ffn in blocks)
    else:
        largest = max((mixer + ffn for mixer, ffn in blocks), default=0.0)
        kept = unit_input * len(blocks)
    in_blocks = (kept * in_work.micro_batches + largest) * tokens
    if in_work.sequence_ranks > 1:
        states = sum(kinds[i].state_elements(config).recurrent for i in part.blocks)
        in_blocks += 4 * micro_batch_size * states * in_work.micro_batches
    if length < sequence_length:
        elements = [kinds[index].state_elements(config) for index in part.blocks]
        cached = sum(state.convolution + sequence_length * state.cache_per_token for state in elements)
        recurrent = sum(state.recurrent for state in elements)
        states = in_work.micro_batches + 2
        in_blocks += states * micro_batch_size * (4 * recurrent + hardware.compute_bytes * cached)
    if not part.head:
        return float(in_blocks)
    head = 2 * hardware.compute_bytes * config.d_model * tokens * in_work.micro_batches
    logits = (8 + hardware.compute_bytes) * config.vocab_size * min(tokens, LOSS_CHUNK_TOKENS)
    return float(in_blocks + head + logits)


def states_between_chunks_bytes(
    config: ModelConfig, micro_batch_size: int, sequence_length: int, time_chunk: int | None, compute_bytes: int
) -> float:
    """Bytes of the states between time chunks that wait for the backward pass of one micro-batch.

    Those behind all chunks but the last two: the newest is in work (`activation_bytes`). Caches are kept once, there.
    """
    chunks = 1 if time_chunk is None else -(-sequence_length // time_chunk)
    elements = state_elements(config)
    of_one = 4 * elements["recurrent"] + compute_bytes * elements["convolution"]
    return float(max(0, chunks - 2) * micro_batch_size * of_one)


def state_bytes(config: ModelConfig, context: int = 0, state_dtype_bytes: int = 4, cache_dtype_bytes: int = 2) -> int:
    """Bytes that one sequence needs while it is decoded: recurrent states and, for attention, `context` cached tokens.

    The convolutions' last inputs count with the cache's dtype, that of the activations. The copies of the normaliser in
    a state that decoding overwrites (kernels.mlstm.step), about 3 % of the memory, are not in it.
    """
    elements = state_elements(config)
    cached = elements["convolution"] + context * elements["cache_per_token"]
    return state_dtype_bytes * elements["recurrent"] + cache_dtype_bytes * cached
