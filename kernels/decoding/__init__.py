"""The products of one decoding step of the 7B block, each with what surrounds it, as a launch of its own on a GPU.

A step reads every weight once and does little else; what it costs beyond that are launches. Each of these functions is
one (with several rows two: their norm is a launch of its own, kernels.decoding.fused).

Axes: M rows (sequences), D model width, F inner width, V vocabulary, NH heads, DK query/key and DV value dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend_choice
from kernels.decoding import reference, tiles
from kernels.decoding.inputs import MixerInputs, MixerWeights, NormWeights

__all__ = [
    "MAX_NORM_WIDTH",
    "MAX_ROWS",
    "MixerInputs",
    "MixerWeights",
    "NormWeights",
    "added_product",
    "has_room_for_tiles",
    "logits",
    "mixer_inputs",
    "mixer_output",
    "swiglu",
]

# What one tile of the kernels holds. More rows are the business of ordinary products.
MAX_ROWS = 64
# The widest input behind a norm: a program holds it whole, and a head norm's with each head in a power of two.
MAX_NORM_WIDTH = 8192


def has_room_for_tiles(device: torch.device) -> bool:
    """Whether a multiprocessor of the device has the shared memory that the kernels need: data centres' GPUs do."""
    if device.type != "cuda":
        return True
    from kernels.triton_support import shared_memory

    return shared_memory(device) >= tiles.MOST_SHARED_BYTES


def mixer_inputs(
    x: Tensor, norm: NormWeights, weights: MixerWeights, gate_cap: float | None, backend: str = "auto"
) -> MixerInputs:
    """What an mLSTM layer makes of rms_norm(x): queries, keys, values, output gate, and both gates of the cell.

    Args:
        x: [M, D], any floating dtype.
        norm, weights: matrices in x's dtype.
        gate_cap: the soft cap of the gates of the cell, after their bias; None: none.
        backend: one of kernels.backend_choice.BACKENDS; "auto" chooses.

    Returns:
        features in x's dtype, gates in float32 (float64 if an input is); all is summed in that.

    Raises:
        ValueError: the shapes do not fit, or the backend cannot do this.
    """
    q, k, v, output_gate, igate, _, fgate, _ = weights
    matrices = {"q": q, "k": k, "v": v, "output_gate": output_gate, "igate": igate, "fgate": fgate}
    _check(x, norm, matrices)
    if q.shape != k.shape or v.shape != output_gate.shape or igate.shape != fgate.shape:
        shapes = ", ".join(f"{name} {tuple(matrix.shape)}" for name, matrix in matrices.items())
        raise ValueError(f"q and k, v and output_gate, igate and fgate must have one shape each, got {shapes}")
    if _is_fused(backend, x, *matrices.values(), normed=x.shape[1]):
        from kernels.decoding import fused

        return fused.mixer_inputs(x, norm, weights, gate_cap)
    return reference.mixer_inputs(x, norm, weights, gate_cap)


def mixer_output(
    h: Tensor,
    gate_preact: Tensor,
    norm: NormWeights,
    weight: Tensor,
    residual: Tensor,
    backend: str = "auto",
) -> Tensor:
    """residual + weight (sigmoid(gate_preact) * head_norm(h)): from the cell's output to the residual stream.

    Args:
        h: [M, NH, DV].
        gate_preact: [M, NH * DV].
        norm: scale [NH * DV] and epsilon of the head norm (kernels.head_norm).
        weight: [D, NH * DV] in h's dtype.
        residual: [M, D].
        backend: one of kernels.backend_choice.BACKENDS; "auto" chooses.

    Returns:
        [M, D] in residual's dtype.

    Raises:
        ValueError: the shapes do not fit, or the backend cannot do this.
    """
    _check(h.flatten(1), norm, {"weight": weight})
    if gate_preact.shape != (h.shape[0], weight.shape[1]) or residual.shape != (h.shape[0], weight.shape[0]):
        raise ValueError(
            f"mixer_output needs gate_preact [M, NH * DV] and residual [M, D], got {tuple(gate_preact.shape)} and "
            f"{tuple(residual.shape)} for h {tuple(h.shape)} and weight {tuple(weight.shape)}"
        )
    if _is_fused(backend, h, weight, residual, normed=weight.shape[1]):
        from kernels.decoding import fused

        return fused.mixer_output(h, gate_preact, norm, weight, residual)
    return reference.mixer_output(h, gate_preact, norm, weight, residual)


def swiglu(x: Tensor, norm: NormWeights, gate_weight: Tensor, up_weight: Tensor, backend: str = "auto") -> Tensor:
    """SiLU(gate_weight rms_norm(x)) * (up_weight rms_norm(x)): [M, D] and two weights [F, D] -> [M, F] in x's dtype.

    Raises:
        ValueError: the shapes do not fit, or the backend cannot do this.
    """
    _check(x, norm, {"gate_weight": gate_weight, "up_weight": up_weight})
    if gate_weight.shape != up_weight.shape:
        raise ValueError(
            f"gate_weight and up_weight must have one shape, got {tuple(gate_weight.shape)} and "
            f"{tuple(up_weight.shape)}"
        )
    if _is_fused(backend, x, gate_weight, up_weight, normed=x.shape[1]):
        from kernels.decoding import fused

        return fused.swiglu(x, norm, gate_weight, up_weight)
    return reference.swiglu(x, norm, gate_weight, up_weight)


def added_product(x: Tensor, weight: Tensor, residual: Tensor, backend: str = "auto") -> Tensor:
    """residual + weight x: [M, F], [D, F] and [M, D] -> [M, D] in residual's dtype.

    Raises:
        ValueError: the shapes do not fit, or the backend cannot do this.
    """
    if x.dim() != 2 or weight.shape[1:] != x.shape[1:] or residual.shape != (x.shape[0], weight.shape[0]):
        raise ValueError(
            f"added_product needs x [M, F], weight [D, F] and residual [M, D], got {tuple(x.shape)}, "
            f"{tuple(weight.shape)} and {tuple(residual.shape)}"
        )
    if _is_fused(backend, x, weight, residual):
        from kernels.decoding import fused

        return fused.added_product(x, weight, residual)
    return reference.added_product(x, weight, residual)


def logits(x: Tensor, norm: NormWeights, weight: Tensor, cap: float | None, backend: str = "auto") -> Tensor:
    """soft_cap(weight rms_norm(x)): [M, D] and [V, D] -> [M, V] in float32 (float64 if an input is).

    Raises:
        ValueError: the shapes do not fit, or the backend cannot do this.
    """
    _check(x, norm, {"weight": weight})
    if _is_fused(backend, x, weight, normed=x.shape[1]):
        from kernels.decoding import fused

        return fused.logits(x, norm, weight, cap)
    return reference.logits(x, norm, weight, cap)


def _check(x: Tensor, norm: NormWeights, weights: dict[str, Tensor]) -> None:
    width = x.shape[-1]
    named = {"norm_weight": norm.norm_weight, **weights}
    if x.dim() != 2 or any(weight.shape[-1] != width for weight in named.values()):
        shapes = ", ".join(f"{name} {tuple(weight.shape)}" for name, weight in named.items())
        raise ValueError(f"norm and weights must be as wide as the input {tuple(x.shape)}, got {shapes}")


def _is_fused(backend: str, x: Tensor, *others: Tensor, normed: int = 0) -> bool:
    """Whether the kernels compute it. `normed`: the width of the norm, if there is one."""

    def unsupported() -> str | None:
        if x.dtype == torch.float64:
            return "the kernels compute in float32 and a tensor is float64"
        if any(tensor.dtype != x.dtype for tensor in others):
            return "the inputs and the weights must have one dtype"
        if not all(tensor.is_contiguous() for tensor in others):
            return "the weights must be contiguous"
        if not 0 < x.shape[0] <= MAX_ROWS:
            return f"there are {x.shape[0]} rows, and it takes 1 to {MAX_ROWS}"
        if normed > MAX_NORM_WIDTH:
            return f"a norm of {normed} elements is wider than {MAX_NORM_WIDTH}"
        return None

    return backend_choice.choose("decoding", backend, x, unsupported) == "triton"
