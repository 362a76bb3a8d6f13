"""What every Triton kernel here needs to know of its toolchain. Only modules that hold Triton kernels import this one.

Nothing outside them may import Triton at module level: there is none on a Mac, where the references run.
"""

import functools

import torch
import triton

from kernels import backend_choice

# Under Triton's interpreter kernels run as numpy programs, on a CPU; there a dot of bfloat16 is silently wrong.
INTERPRETED = backend_choice.INTERPRETED
# What the kernels were tested with.
SUPPORTED_VERSIONS = ((3, 6), (3, 9))


def triton_version() -> tuple[int, int]:
    """Major and minor version of the Triton that is installed."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on a CUDA device: what Triton refuses a kernel by."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])
