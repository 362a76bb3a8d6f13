"""Launches of the Triton kernels of the loss (row_kernels.py).

Axes: N tokens of a chunk, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.cross_entropy.row_kernels import gradients_kernel, losses_and_gradients_kernel, losses_kernel

# A tile is LINES x LANES logits of one token. Every lane keeps a running maximum and sum of its own: the threads meet
# once for each token, not once for each tile.
TILE = {"LINES": 2, "LANES": 2048, "num_warps": 8}


def _launch(kernel: Any, logits: Tensor, *of_tokens: Tensor, cap: float | None, z_loss_weight: float) -> None:
    """One program for each row of `logits`; `of_tokens`: the kernel's other tensors, in its order."""
    tokens, vocabulary = logits.shape
    with torch.cuda.device_of(logits):
        kernel[(tokens,)](
            logits,
            *of_tokens,
            vocabulary,
            logits.stride(0),
            1.0 if cap is None else cap,
            z_loss_weight,
            HAS_CAP=cap is not None,
            **TILE,
        )


def store_losses(
    logits: Tensor, targets: Tensor, losses: Tensor, log_sums: Tensor, cap: float | None, z_loss_weight: float
) -> None:
    """Losses and log-sum-exps of capped logits, 0 where masked.

    Args:
        logits: [N, V], 16-bit or float32, before the cap; the last axis has stride 1.
        targets: [N] int64.
        losses, log_sums: [N] float32, written.
        cap, z_loss_weight: as for linear_cross_entropy.
    """
    _launch(losses_kernel, logits, targets, losses, log_sums, cap=cap, z_loss_weight=z_loss_weight)


def store_gradients(
    logits: Tensor, targets: Tensor, log_sums: Tensor, scales: Tensor, cap: float | None, z_loss_weight: float
) -> None:
    """Overwrite logits (as above) with scales [N] float32 times the gradient of each token's loss; 0 where masked."""
    _launch(gradients_kernel, logits, targets, log_sums, scales, cap=cap, z_loss_weight=z_loss_weight)


def store_losses_and_gradients(
    logits: Tensor, targets: Tensor, losses: Tensor, cap: float | None, z_loss_weight: float
) -> None:
    """Both in one launch: write losses [N] float32 and overwrite logits (as above) with their gradient."""
    _launch(losses_and_gradients_kernel, logits, targets, losses, cap=cap, z_loss_weight=z_loss_weight)
