"""What every Triton kernel here needs to know of its toolchain. Only modules that hold Triton kernels import this one.

Nothing outside them may import Triton at module level: there is none on a Mac, where the references run.
"""

import torch
import triton
import triton.language as tl

from kernels import backend_choice

# Under Triton's interpreter kernels run as numpy programs, on a CPU; there a dot of bfloat16 is silently wrong.
INTERPRETED = backend_choice.INTERPRETED
# What the kernels were tested with.
SUPPORTED_VERSIONS = ((3, 6), (3, 9))


def triton_version() -> tuple[int, int]:
    """Major and minor version of the Triton that is installed."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a @ b in float32: exact products for float32 operands (no TF32), tensor cores for 16-bit ones."""
    return tl.dot(a, b, accumulator, input_precision="ieee")


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`; Triton's blocks have such sizes."""
    # Triton's own function takes longer on the host than a launch.
    return 1 << (value - 1).bit_length()


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient, rounded up: how many tiles of a size cover a dimension."""
    return -(-dividend // divisor)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
