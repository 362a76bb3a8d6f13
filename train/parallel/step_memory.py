"""What DeepSpeed 0.19.8 holds beside weights, optimizer and activations, in the passes of a step and at its end.

P parameters of a rank's part of the model, n ranks that share it, c bytes of the compute dtype, B the elements of a
bucket (500 million, or P if there are fewer). A step with one pass has no gradients yet where activations are at their
peak. A unit is a micro-batch, or a time chunk of one.

| | gradients in passes | buffers in passes | gradients and copies at the end |
|---|---|---|---|
| ZeRO-0 | 4 P | | 4 P + 4 B: a bucket in a row, to be reduced |
| ZeRO-1, bf16 | 4 P; with several units or CUDA graphs 2 P more | | 6 P + 6 B: a bucket in a row, and in bf16 |
| ZeRO-1, fp32 | 4 P | 4 B | 4 P + 4 P / n: this rank's part in a row |
| ZeRO-2 | 4 P / n; with one unit none yet | c B | 4 P / n, and those that decay once more in a row |
| ZeRO-3 | 4 P / n | c B, and gathered weights: c for each of P or of 1000 million | the same |

Measured on H200: docs/log.md, 2026-11-29.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.config import RunConfig

# DeepSpeed's defaults, which runs have.
_BUCKET_ELEMENTS = 500_000_000
_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a rank.

    Attributes:
        gradients, buffers: while a pass has its activations.
        at_the_end: of gradients and their copies when all passes are done.
    """

    gradients: float
    buffers: float
    at_the_end: float


@dataclass(frozen=True)
class Held:
    """What a rank holds: parameters of its part of the model, and how many of them do not decay."""

    parameters: int
    not_decayed: int


def step_memory(config: RunConfig, held: Held, ranks: int, units: int, captures: bool) -> StepMemory:
    """Of a rank among `ranks` that share `held`, which takes `units` passes a step on a GPU.

    `captures`: blocks are played from CUDA graphs.
    """
    stage, width = config.parallel.zero_stage, config.precision.compute_dtype.itemsize
    whole, bucket = held.parameters, min(held.parameters, _BUCKET_ELEMENTS)
    shared = whole / ranks
    if stage == 0:
        return StepMemory(4.0 * whole, 0.0, 4.0 * (whole + bucket))
    if stage == 1 and config.precision.is_bf16:
        last = 2.0 * whole
        return StepMemory(
            4.0 * whole + (last if units > 1 or captures else 0.0), 0.0, 4.0 * whole + last + 6.0 * bucket
        )
    if stage == 1:
        return StepMemory(4.0 * whole, 4.0 * _BUCKET_ELEMENTS, 4.0 * (whole + shared))
    if stage == 2:
        decayed = (whole - held.not_decayed) / ranks
        in_passes = 4.0 * shared if units > 1 else 0.0
        return StepMemory(in_passes, float(width * _BUCKET_ELEMENTS), 4.0 * (shared + decayed))
    gathered = width * min(whole, _LIVE_PARAMETERS)
    return StepMemory(4.0 * shared, float(width * _BUCKET_ELEMENTS + gathered), 4.0 * shared)
