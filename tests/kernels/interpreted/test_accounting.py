"""Bytes that are said to be kept for the backward pass, against those of the tensors that autograd saves."""

import pytest
import torch

from kernels.mlstm import mlstm
from kernels.mlstm.accounting import CellShape, triton_kept_bytes
from kernels.mlstm.chunkwise import problem
from kernels.slstm import accounting, slstm


def saved(run, *without):
    """Bytes of all different tensors saved while `run` runs, but for those of `without`."""
    kept = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x)
    with hooks:
        result = run()
    left_out = {x.data_ptr() for x in without}
    return sum(x.nbytes for place, x in kept.items() if place not in left_out and x.numel()), result


@pytest.mark.parametrize(
    ("length", "keep", "gate_dtype"), [(1, True, torch.float32), (70, False, torch.float16), (70, True, torch.float32)]
)
def test_mlstm(length, keep, gate_dtype, dtype, device):
    shape = CellShape(2, length, 1, 16, 32)
    tokens = (shape.batch, shape.length, shape.heads)
    leaves = [torch.randn(*tokens, size, device=device, dtype=dtype) for size in (16, 16, 32)]
    leaves += [torch.randn(tokens, device=device, dtype=gate_dtype) for _ in range(2)]
    leaves = [x.requires_grad_() for x in leaves]
    chunk = problem.choose_tiles(dtype, 16, 32, 2, device).chunk
    expected = triton_kept_bytes(shape, dtype, gate_dtype, chunk, keep)
    assert saved(lambda: mlstm(*leaves, backend="triton", keep_chunk_states=keep))[0] == sum(expected)


@pytest.mark.parametrize("cap", [None, 15.0])
def test_slstm(cap, dtype, device):
    gates_x = torch.randn(2, 5, 4, 3, 16, device=device, requires_grad=True)
    kernel = torch.randn(3, 16, 4, 16, device=device, dtype=dtype, requires_grad=True)
    total, _ = saved(lambda: slstm(gates_x, kernel, gate_soft_cap=cap, backend="triton"), kernel)
    # h, c and n of the initial state and c and n of the last one do not grow with S.
    states = 5 * 4 * 2 * 3 * 16
    assert total - states == accounting.triton_kept_bytes(2 * 5, 3 * 16, dtype, cap is not None)


def test_slstm_loop():
    gates_x = torch.randn(2, 5, 4, 3, 16, requires_grad=True)
    kernel = torch.randn(3, 16, 4, 16, requires_grad=True)
    total, _ = saved(lambda: slstm(gates_x, kernel), kernel)
    initial_h = 4 * 2 * 3 * 16
    assert total - initial_h == accounting.loop_kept_bytes(2, 5, 3 * 16)
