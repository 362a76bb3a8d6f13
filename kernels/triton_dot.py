"""The matrix product that all Triton kernels here share."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a @ b in float32: exact products for float32 operands (no TF32), tensor cores for 16-bit ones."""
    return tl.dot(a, b, accumulator, input_precision="ieee")
