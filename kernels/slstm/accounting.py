"""Bytes that the sLSTM cell keeps from its forward pass for its backward pass; needs no Triton and no GPU.

Axes: B batch, S sequence, NH heads, DH dimension of a head.
"""

import torch


def kinds_of_derivatives(with_cap: bool) -> int:
    """How many numbers of each unit and token the kernels of triton_forward.py keep, given a soft cap or none."""
    return 8 if with_cap else 7


def triton_kept_bytes(tokens: int, width: int, weights_dtype: torch.dtype, with_cap: bool) -> int:
    """Of one call of the Triton kernels, without what does not grow with S and the weights themselves.

    h [B, S, NH, DH] in the dtype of the weights (it is the cell's output where that is gates_x's) and the derivatives.
    gates_x is not kept.

    Args:
        tokens: B * S.
        width: NH * DH.
        weights_dtype: of the recurrent weights as the kernels take them: autocast's, where it is on.
        with_cap: whether i and f have a soft cap.
    """
    return (1 + kinds_of_derivatives(with_cap)) * tokens * width * weights_dtype.itemsize


def loop_kept_bytes(batch: int, length: int, width: int) -> int:
    """Of one call of the loop in PyTorch, float32: gates, weights, memory and outputs of kernels/slstm/loop.py."""
    return 4 * batch * width * ((4 + 2 + 2 + 1) * length + 2)
