"""How the cooperating programs of a team hand each other numbers: the data are their own flags.

A head's recurrent weights do not fit one multiprocessor, so a team of programs shares them and exchanges numbers at
each token, through the L2 cache. A separate flag would cost two more round trips to it (data, fence, flag; flag, data).
Instead the reader looks at the numbers themselves until each has arrived: an element of 16 or 32 bits is written at
once. All programs must be resident together (cooperative launch). A wait is bounded: results become NaN if it fails.
"""

import triton
import triton.language as tl

# Bits of a number that has not arrived: a NaN that no arithmetic produces.
NOT_WRITTEN = -1
# About a second; then the rest of the call no longer waits.
MAX_POLLS = 1 << 20


@triton.jit
def await_written(pointers, mask, max_polls):
    """Bits at `pointers` (2D) once none is NOT_WRITTEN, and the polls allowed from now on (0 after a failure)."""
    bits = tl.load(pointers, mask, other=0, volatile=True)
    missing = tl.max(tl.max((bits == -1).to(tl.int32), 1), 0)
    polls = 0
    while (missing > 0) & (polls < max_polls):
        bits = tl.load(pointers, mask, other=0, volatile=True)
        missing = tl.max(tl.max((bits == -1).to(tl.int32), 1), 0)
        polls += 1
    return bits, tl.where(missing > 0, 0, max_polls)


@triton.jit
def await_phase(pointers, mask, phase, max_polls):
    """float32 at int32 `pointers` (2D) once the lowest bit of each is `phase`, and the polls allowed from now on.

    The lowest bit of the mantissa says which turn a number in a buffer that is used again belongs to. It reads as 0.
    """
    bits = tl.load(pointers, mask, other=0, volatile=True)
    missing = tl.max(tl.max((mask & ((bits & 1) != phase)).to(tl.int32), 1), 0)
    polls = 0
    while (missing > 0) & (polls < max_polls):
        bits = tl.load(pointers, mask, other=0, volatile=True)
        missing = tl.max(tl.max((mask & ((bits & 1) != phase)).to(tl.int32), 1), 0)
        polls += 1
    values = (bits & -2).to(tl.float32, bitcast=True)
    return values, tl.where(missing > 0, 0, max_polls)


@triton.jit
def with_phase(values, phase):
    """Bits of float32 `values` with `phase` (0 or 1) as the lowest."""
    return (values.to(tl.int32, bitcast=True) & -2) | phase


@triton.jit
def product(a, b):
    """a @ b, added in float32; float32 factors keep their precision on tensor cores (as three TF32 products)."""
    return tl.dot(a, b, input_precision="tf32x3")
