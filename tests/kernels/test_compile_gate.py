"""The compile gate compiles for Hopper without a GPU and tells what a kernel costs."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from tests.kernels.compile_gate import assert_lean, compile_launches  # noqa: E402


@triton.jit
def _product(a, b, out, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + offsets, tl.dot(tl.load(a + offsets), tl.load(b + offsets)))


@triton.jit
def _product_of_many(a, b, out, count, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.load(a + offsets)
    for _ in range(count):
        total = tl.dot(total, tl.load(b + offsets)).to(total.dtype)
        b += SIZE * SIZE
    tl.store(out + offsets, total)


def launch_many(size, warps):
    a, b = (torch.empty(size, size, dtype=torch.bfloat16) for _ in range(2))
    _product_of_many[(1,)](a, b, torch.empty(size, size), 7, SIZE=size, num_warps=warps)


def launch(size, warps):
    a, b = (torch.empty(size, size, dtype=torch.bfloat16) for _ in range(2))
    _product[(1,)](a, b, torch.empty(size, size), SIZE=size, num_warps=warps)


def launch_nothing_that_compiles():
    _product[(1,)](torch.empty(4), torch.empty(4), torch.empty(4), SIZE=48)


@pytest.mark.slow
def test_reports_tensor_cores_and_spills():
    (lean,), (crowded,) = compile_launches([(launch, {"size": 64, "warps": 4}), (launch, {"size": 256, "warps": 4})])
    assert lean.name == "_product" and lean.wgmma > 0 and lean.mma == 0 and lean.stack_bytes == 0
    assert 0 < lean.registers <= 255 and lean.shared_bytes > 0
    assert_lean(lean, tensor_cores=True)
    # A tile of 256 x 256 float32 does not fit the registers of 4 warps.
    assert crowded.stack_bytes > 0
    with pytest.raises(AssertionError, match="stack_bytes"):
        assert_lean(crowded)


@pytest.mark.slow
def test_tells_spills_in_a_loop_from_others():
    cases = [(launch, 256), (launch_many, 64), (launch_many, 256)]
    (single,), (lean,), (crowded,) = compile_launches([(f, {"size": size, "warps": 4}) for f, size in cases])
    assert single.stack_bytes > 0 and single.spills_in_loop is None
    assert lean.stack_bytes == 0 and lean.spills_in_loop == 0
    assert crowded.spills_in_loop > 0


@pytest.mark.slow
def test_names_the_call_that_does_not_compile():
    with pytest.raises(AssertionError, match=r"(?s)launch_nothing_that_compiles\({}\) did not compile.*power of 2"):
        compile_launches([(launch, {"size": 64, "warps": 4}), (launch_nothing_that_compiles, {})])
