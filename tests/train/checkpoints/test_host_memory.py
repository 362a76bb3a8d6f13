"""Copies of a checkpoint's tensors on the host."""

import logging

import pytest
import torch

from train.checkpoints.host_memory import HostMemory

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def test_on_a_cpu_every_copy_has_memory_of_its_own():
    memory = HostMemory(CPU)
    memory.prepare([24])
    tensor = torch.arange(6.0).view(2, 3)
    first = memory.copy(tensor)
    tensor.zero_()
    memory.clear()
    second = memory.copy(tensor)
    assert first.tolist() == [0, 1, 2, 3, 4, 5] and second.tolist() == [0] * 6


@pytest.mark.gpu
def test_copies_from_a_gpu_are_exact_across_pieces_and_beyond_what_was_prepared():
    tensors = [torch.randn(size, device=GPU) for size in (1, 70, 1000, 3, 4096)] + [
        torch.randint(0, 2**15, (333,), device=GPU, dtype=torch.int16),
        torch.randn(129, device=GPU, dtype=torch.bfloat16).view(3, 43),
    ]
    memory = HostMemory(GPU, piece_bytes=1024)
    # One is not prepared.
    memory.prepare([tensor.nbytes for tensor in tensors[1:]])
    for _ in range(2):
        memory.clear()
        copies = [memory.copy(tensor) for tensor in tensors]
        torch.cuda.synchronize()
        for tensor, copy in zip(tensors, copies, strict=True):
            assert copy.dtype == tensor.dtype and torch.equal(copy, tensor.reshape(-1).cpu())
        assert all(copy.is_pinned() for copy in copies)
        for tensor in tensors:
            tensor.neg_()


@pytest.mark.gpu
def test_memory_that_cannot_be_locked_is_copied_to_all_the_same(caplog, monkeypatch):
    runtime = torch.cuda.cudart()

    class Refusing:
        def __getattr__(self, name):
            return (lambda *_: 2) if name == "cudaHostRegister" else getattr(runtime, name)

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    memory = HostMemory(GPU)
    with caplog.at_level(logging.WARNING):
        memory.prepare([4000])
        memory.clear()
    assert "0.0 GiB of the 0.0 of a checkpoint could be page-locked (CUDA error 2)" in caplog.text
    tensor = torch.randn(1000, device=GPU)
    copy = memory.copy(tensor)
    torch.cuda.synchronize()
    assert torch.equal(copy, tensor.cpu())
