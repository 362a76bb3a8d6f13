"""Memory of training and decoding, from a model's configuration alone.

The activations are those that the layers of this package keep for the backward pass with fused norms (as on a GPU); a
layer's kind says how many (model/layers). c is the bytes of the compute dtype (bf16: 2, fp32: 4). Bytes per token of
each half of a block, with D model width, F feed-forward width, K convolution kernel, L chunk, NH heads, QK and V the
total query and value widths, DK and DV those of a head, E the inner width of the NeurIPS mLSTM:

    mLSTM (7B)      c (2D + 3V) + u D + cell(QK, V)       u = 4 for bf16 on a CPU, else 0: fp32 gate inputs
    mLSTM (NeurIPS) c (2D + 7E) + (4K + g) E + cell(E, E)             g = 3c on a GPU, else 12: gate inputs;
                    compiled c (2D + 4E) + 4K E + cell(E, E)
    cell(QK, V)     kernels: c (2 QK + V) + 40 NH + 4 NH / L + NH DK (c DV + 4) / L;
                    reference: 24 QK + 16 V + 8 NH + 12 NH L + 8 NH DK (DV + 1) / L
    sLSTM           kernels: ((4 + k) c + 4K + 4 + u') D, k = 8 with a soft cap, else 7: numbers of each unit;
                    u' = 8 for bf16, else 0: fp32 gate inputs; reference and loop: (4 c + 4K + 48) D
    attention       c (4D + 2 KV) + 8 D / NH + c S        KV: total width of the keys; the last term: the document mask
      in a window W c (4D + 4 KV) + 8 D / NH + 2 c W      where it is shorter than S: blocks of queries, keys twice
      with sinks    c D + 8 c (2 NH + 2 NKV) more                       (4 NKV in a window)
    SwiGLU          c (2D + 4F), compiled c (2D + 3F);    gated GELU: the same
    head            kernels: 3 c D, and once the larger of c V for each of at most 4096 tokens + 4 V D, the chunk of
                    logits in work and the gradient of the weight, and (8 + c) V D, that gradient as it is scaled;
                    reference: 2 c D, and once (8 + c) V for each of at most 2048 tokens of the chunk

Temporaries of a single operation, gradients of activations and the allocator's fragmentation are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.accounting import REFERENCE, count_parameters, state_elements
from model.config import ModelConfig
from model.hardware import CPU, Hardware
from model.layers import feed_forward, layer_kinds
from model.layers.base import LayerKind, StateElements
from model.parts import Part
from model.recomputation import ACTIVATION_CHECKPOINTING, unknown_mode

# Tokens whose logits the kernels, and the reference, have in work at once.
LOSS_CHUNK_TOKENS = 4096
REFERENCE_LOSS_CHUNK_TOKENS = 2048


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


@dataclass(frozen=True)
class Activations:
    """Bytes at the peak of a pass, by what they are."""

    # Of blocks: what they keep, and all of the largest half or block that is computed again.
    blocks: float = 0.0
    # Of blocks too: the memory that enters each chunk of the recurrences.
    chunk_states: float = 0.0
    # States that pass between slices or between time chunks.
    passed_states: float = 0.0
    # The head's inputs.
    head: float = 0.0
    # The chunk of logits in work, and what is made of it before blocks go backward.
    logits: float = 0.0

    @property
    def total(self) -> float:
        return self.blocks + self.chunk_states + self.passed_states + self.head + self.logits


def activation_bytes(
    config: ModelConfig,
    micro_batch_size: int,
    sequence_length: int,
    activation_checkpointing: str = "none",
    hardware: Hardware = REFERENCE,
    part: Part | None = None,
    in_work: InWork | None = None,
) -> float:
    """Bytes of activations at the peak of one micro-batch: all that `activations` tells apart."""
    batch = (micro_batch_size, sequence_length)
    return activations(config, *batch, activation_checkpointing, hardware, part, in_work).total


def activations(
    config: ModelConfig,
    micro_batch_size: int,
    sequence_length: int,
    activation_checkpointing: str = "none",
    hardware: Hardware = REFERENCE,
    part: Part | None = None,
    in_work: InWork | None = None,
) -> Activations:
    """Activations at the peak of one micro-batch, from the formula in this module's docstring.

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
    of_kind = {kind.name: _halves(config, kind, sequence_length, hardware) for kind in dict.fromkeys(kinds)}
    units = [half for index in part.blocks for half in of_kind[kinds[index].name]]
    if activation_checkpointing == "block":
        units = [_Kept.sum_of(of_kind[kinds[index].name]) for index in part.blocks]
    kept, largest = _Kept.sum_of(units), _Kept()
    if activation_checkpointing != "none":
        kept = _Kept(float(hardware.compute_bytes * config.d_model * len(units)))
        largest = max(units, key=lambda unit: unit.others + unit.chunk_states, default=_Kept())
    in_head = logits = 0.0
    if part.head:
        in_head, logits = _head(config, tokens, hardware, in_work)
    return Activations(
        blocks=(kept.others * in_work.micro_batches + largest.others) * tokens,
        chunk_states=(kept.chunk_states * in_work.micro_batches + largest.chunk_states) * tokens,
        passed_states=float(
            _passed_states(
                [kinds[index].state_elements(config) for index in part.blocks],
                micro_batch_size,
                None if length == sequence_length else sequence_length,
                hardware.compute_bytes,
                in_work,
            )
        ),
        head=in_head,
        logits=logits,
    )


@dataclass(frozen=True)
class _Kept:
    """Bytes per token that a half of a block keeps."""

    others: float = 0.0
    chunk_states: float = 0.0

    @classmethod
    def sum_of(cls, parts: Sequence[_Kept]) -> _Kept:
        return cls(sum(part.others for part in parts), sum(part.chunk_states for part in parts))


def _halves(config: ModelConfig, kind: LayerKind, sequence_length: int, hardware: Hardware) -> list[_Kept]:
    """The mixer, and the feed-forward layer if there is one."""
    states = kind.chunk_state_bytes(config, sequence_length, hardware)
    halves = [_Kept(kind.activation_bytes(config, sequence_length, hardware) - states, states)]
    if kind.has_feed_forward:
        halves.append(_Kept(feed_forward.activation_bytes(config, hardware)))
    return halves


def _head(config: ModelConfig, tokens: int, hardware: Hardware, in_work: InWork) -> tuple[float, float]:
    """What it keeps of its inputs, and at most has in work."""
    c, vocabulary, width = hardware.compute_bytes, config.vocab_size, config.d_model
    inputs = 2.0 * c * width * tokens * in_work.micro_batches
    if hardware.device_name == CPU:
        return inputs, float((8 + c) * vocabulary * min(tokens, REFERENCE_LOSS_CHUNK_TOKENS))
    in_chunks = c * vocabulary * min(tokens, LOSS_CHUNK_TOKENS) + 4 * vocabulary * width
    return inputs + c * width * tokens, float(max(in_chunks, (8 + c) * vocabulary * width))


def _passed_states(
    states: Sequence[StateElements],
    micro_batch_size: int,
    cut_length: int | None,
    compute_bytes: int,
    in_work: InWork,
) -> int:
    """Of blocks with these states, what enters slices; or of a sequence of `cut_length` what enters, leaves and comes
    back of time chunks."""
    recurrent = sum(state.recurrent for state in states)
    between_slices = 4 * micro_batch_size * recurrent * in_work.micro_batches if in_work.sequence_ranks > 1 else 0
    if cut_length is None:
        return between_slices
    cached = sum(state.convolution + state.window + cut_length * state.cache_per_token for state in states)
    copies = in_work.micro_batches + 2
    return between_slices + copies * micro_batch_size * (4 * recurrent + compute_bytes * cached)


def prefill_bytes_per_token(config: ModelConfig, context: int, hardware: Hardware) -> float:
    """Bytes of activations for each token of a stretch that is read without gradients, behind at most `context` others.

    The residual stream before and after a half of a block, and all of the largest half: what it would keep for a
    backward pass is there at once without one too. The head's logits are those of one token.
    """
    largest = max(
        half.others + half.chunk_states
        for kind in dict.fromkeys(layer_kinds(config))
        for half in _halves(config, kind, max(1, context), hardware)
    )
    return largest + 2 * hardware.compute_bytes * config.d_model


def states_between_chunks_bytes(
    config: ModelConfig, micro_batch_size: int, sequence_length: int, time_chunk: int | None, compute_bytes: int
) -> float:
    """Bytes of the states between time chunks that wait for the backward pass of one micro-batch.

    Those behind all chunks but the last two: the newest is in work (`activation_bytes`). Caches are kept once, there.
    """
    chunks = 1 if time_chunk is None else -(-sequence_length // time_chunk)
    elements = state_elements(config)
    of_one = 4 * elements["recurrent"] + compute_bytes * (elements["convolution"] + elements["window"])
    return float(max(0, chunks - 2) * micro_batch_size * of_one)


def state_bytes(config: ModelConfig, context: int = 0, state_dtype_bytes: int = 4, cache_dtype_bytes: int = 2) -> int:
    """Bytes that one sequence needs while it is decoded: recurrent states and, for attention, `context` cached tokens.

    Of attention in a window its whole cache counts, which is there from the first token. The convolutions' last inputs
    count with the cache's dtype, that of the activations. The copies of the normaliser in a state that decoding
    overwrites (kernels.mlstm.step), about 3 % of the memory, are not in it.
    """
    elements = state_elements(config)
    cached = elements["convolution"] + elements["window"] + context * elements["cache_per_token"]
    return state_dtype_bytes * elements["recurrent"] + cache_dtype_bytes * cached
