"""Layer normalisation of each head by itself on what a recurrence puts out, alone or with the output gate behind it.

Axes: B batch, S sequence, NH heads, DV value dimension of a head.
"""

from torch import Tensor

from kernels import backend_choice
from kernels.head_norm import reference

# The widest head whose row one Triton program holds in registers.
MAX_HEAD_DIM = 4096


def head_norm(h: Tensor, weight: Tensor, *, eps: float, backend: str = "auto") -> Tensor:
    """Normalise every head of every token to mean 0 and variance 1, then scale. There is no bias.

    Source: xLSTM (arXiv 2405.04517), figures 10 and 11 ("GN"); xLSTM-7B uses eps = 1e-6.

    Args:
        h: [B, S, NH, DV], any floating dtype.
        weight: [NH * DV], the scale.
        eps: added to the variance.
        backend: one of kernels.backend_choice.BACKENDS; "auto" chooses.

    Returns:
        [B, S, NH * DV] in h's dtype; mean, variance and scaling are computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: the shapes do not fit, or the backend cannot do this.
    """
    if h.dim() != 4 or weight.shape != (h.shape[2] * h.shape[3],):
        raise ValueError(
            f"head_norm needs h [B, S, NH, DV] and weight [NH * DV], got {tuple(h.shape)} and {tuple(weight.shape)}"
        )
    if backend_choice.choose("head norm", backend, h, lambda: _unsupported(h, weight)) == "reference":
        return reference.head_norm(h, weight, eps)
    from kernels.head_norm import fused

    return fused.head_norm(h, weight, eps)


def gated_head_norm(h: Tensor, gate_preact: Tensor, weight: Tensor, *, eps: float, backend: str = "auto") -> Tensor:
    """sigmoid(gate_preact) * head_norm(h, weight): the read-out of the 7B mLSTM layer. One pass each way over memory.

    Source: xLSTM-7B (arXiv 2503.13427), section 3.1.

    Args:
        h: [B, S, NH, DV], any floating dtype.
        gate_preact: [B, S, NH * DV] pre-activation of the output gate.
        weight: [NH * DV], the scale of the norm.
        eps: added to the variance.
        backend: one of kernels.backend_choice.BACKENDS; "auto" chooses.

    Returns:
        [B, S, NH * DV] in h's dtype, rounded to it once: all is computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: the shapes do not fit, or the backend cannot do this.
    """
    fits = h.dim() == 4 and weight.shape == (h.shape[2] * h.shape[3],)
    if not fits or gate_preact.shape != (*h.shape[:2], *weight.shape):
        raise ValueError(
            "gated_head_norm needs h [B, S, NH, DV], gate_preact [B, S, NH * DV] and weight [NH * DV], got "
            f"{tuple(h.shape)}, {tuple(gate_preact.shape)} and {tuple(weight.shape)}"
        )
    if backend_choice.choose("head norm", backend, h, lambda: _unsupported(h, gate_preact, weight)) == "reference":
        return reference.gated_head_norm(h, gate_preact, weight, eps)
    from kernels.head_norm import fused

    return fused.gated_head_norm(h, gate_preact, weight, eps)


def _unsupported(h: Tensor, *others: Tensor) -> str | None:
    if any(tensor.dtype.itemsize > 4 for tensor in (h, *others)):
        return "the kernels compute in float32 and a tensor is float64"
    if h.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {h.shape[-1]} is above {MAX_HEAD_DIM}"
    return None
