"""The soft cap (kernels/soft_cap.py) inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def soft_capped(x, cap, HAS_CAP: tl.constexpr):
    """x behind the soft cap, and the derivative of the cap there."""
    slope = 1.0
    if HAS_CAP:
        # tanh and 1 - tanh^2 from exp(-2|x|), which never overflows and leaves the latter its precision near 0.
        decay = tl.exp(-2.0 / cap * tl.abs(x))
        share = 1.0 / (1.0 + decay)
        magnitude = cap * (1.0 - decay) * share
        x = tl.where(x < 0.0, -magnitude, magnitude)
        slope = 4.0 * decay * share * share
    return x, slope
