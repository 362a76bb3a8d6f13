"""The soft cap that keeps pre-activations and logits in a bounded range."""

import torch
from torch import Tensor


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Squash x smoothly into (-cap, cap): cap * tanh(x / cap). Source: xLSTM-7B (arXiv 2503.13427), section 3.2.

    Args:
        x: any shape and floating dtype; the result has the same.
        cap: the bound; None leaves x as it is.

    Raises:
        ValueError: the cap is not positive.
    """
    if cap is None:
        return x
    if cap <= 0:
        raise ValueError(f"a soft cap must be positive, not {cap}; use null for no cap")
    return cap * torch.tanh(x / cap)
