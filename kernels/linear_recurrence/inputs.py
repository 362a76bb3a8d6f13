"""What enters the recurrence at each token. Axes as in the package."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RecurrenceInputs:
    """Arguments of kernels.linear_recurrence.linear_recurrence that have a value for each token, and their scale.

    Attributes:
        q, k: [B, S, NH, DK], any floating dtype.
        v: [B, S, NH, DV] in the same dtype.
        log_decay: [B, S, NH], or [B, S, NH, DK] for a decay of each key feature; at most 0; float32 at least.
        beta: [B, S, NH]: how much of what a key read before is replaced, the delta rule; None: no delta rule. Only with
            one decay of a head.
        scale: factor of the read-out.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        q, k, v, beta = self.q, self.k, self.v, self.beta
        if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
            raise ValueError(
                "a linear recurrence needs q and k [B, S, NH, DK] and v [B, S, NH, DV], got "
                f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if self.log_decay.shape not in (q.shape, q.shape[:3]):
            raise ValueError(
                f"log_decay must be [B, S, NH] or [B, S, NH, DK] for q {tuple(q.shape)}, got "
                f"{tuple(self.log_decay.shape)}"
            )
        if beta is not None and (beta.shape != q.shape[:3] or self.log_decay.shape != q.shape[:3]):
            raise ValueError(
                "the delta rule needs beta and log_decay [B, S, NH], got "
                f"{tuple(beta.shape)} and {tuple(self.log_decay.shape)}"
            )
