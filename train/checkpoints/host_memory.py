"""Host memory that a rank's part of a checkpoint is copied to, while the loop waits.

A GPU writes to page-locked memory several times as fast as to any other, but the operating system takes seconds to lock
some gigabytes. So they are locked once, beside the first steps, and each save uses them again.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Locked at a time: meanwhile other threads that call the driver may wait.
PIECE_BYTES = 64 * 2**20
# A copy begins at a multiple of so many bytes.
_ALIGNMENT = 64


class HostMemory:
    """Of one rank: copies of what is on `device`, valid until the next `clear`.

    What is copied beyond the bytes that were prepared takes memory of its own, as does all that is on a CPU.
    """

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES):
        assert piece_bytes % _ALIGNMENT == 0
        self._device = device
        self._piece_bytes = piece_bytes
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._thread: threading.Thread | None = None

    def prepare(self, sizes: Sequence[int]) -> None:
        """Begin to lock memory for copies of so many bytes each. Once, and only where `device` is a GPU."""
        if self._device.type == "cuda":
            assert self._thread is None, "memory is prepared once"
            nbytes = sum(_aligned(size) for size in sizes)
            self._thread = threading.Thread(target=self._lock, args=(nbytes,), name="checkpoint-memory", daemon=True)
            self._thread.start()

    def clear(self) -> None:
        """Nobody reads the copies any more. Waits until what was prepared is there."""
        if self._thread is not None:
            self._thread.join()
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of the contiguous `tensor` on the host, flat. From a GPU it is complete once the stream is
        synchronized."""
        if not tensor.is_cuda:
            return tensor.reshape(-1).clone()
        begin, end = self._used, self._used + tensor.nbytes
        if end > self._buffer.numel():
            return torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True).copy_(
                tensor.reshape(-1), non_blocking=True
            )
        self._used += _aligned(tensor.nbytes)
        source = tensor.reshape(-1).view(torch.uint8)
        # CUDA copies to no range that was locked in two calls.
        for start in range(begin - begin % self._piece_bytes, end, self._piece_bytes):
            first, last = max(begin, start), min(end, start + self._piece_bytes)
            self._buffer[first:last].copy_(source[first - begin : last - begin], non_blocking=True)
        return self._buffer[begin:end].view(tensor.dtype)

    def _lock(self, nbytes: int) -> None:
        torch.cuda.set_device(self._device)
        try:
            buffer = torch.empty(nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            log.warning("no host memory for a checkpoint's %.1f GiB: %s", nbytes / 2**30, error)
            return
        locked: list[int] = []
        weakref.finalize(self, _unlock, buffer, locked).atexit = False
        for start in range(0, nbytes, self._piece_bytes):
            address, size = buffer.data_ptr() + start, min(self._piece_bytes, nbytes - start)
            problem = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
            if problem:
                # Copies to the rest are right, and slow.
                log.warning(
                    "%.1f GiB of the %.1f of a checkpoint could be page-locked (CUDA error %d): saves hold the loop up "
                    "longer. `ulimit -l` may be too low, or the host's memory too full",
                    start / 2**30,
                    nbytes / 2**30,
                    problem,
                )
                break
            locked.append(address)
        self._buffer = buffer


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _unlock(buffer: Tensor, locked: list[int]) -> None:
    """Memory may not be freed while CUDA holds it."""
    for address in locked:
        torch.cuda.cudart().cudaHostUnregister(address)
    del buffer
