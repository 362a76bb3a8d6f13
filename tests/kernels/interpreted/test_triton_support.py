"""The products that all kernels share, and the helpers of these tests."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.preflight import HeadNormCase, LossCase, MLSTMCase, SLSTMCase, compare
from kernels.triton_dot import dot
from tests.kernels.cases import assert_close, relative_error
from tests.kernels.triton_cases import padded, poisoned_memory, strided


@triton.jit
def _matmul(a, b, out, rows, columns, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    inside = (row < rows) & (column < columns)
    offsets = row * columns + column
    product = dot(
        tl.load(a + offsets, inside, 0.0), tl.load(b + offsets, inside, 0.0), tl.zeros([SIZE, SIZE], tl.float32)
    )
    tl.store(out + offsets, product, inside)


def test_dot_has_exact_products_and_float32_sums(device, dtype):
    torch.manual_seed(0)
    a, b = (torch.randn(32, 32, device=device).to(dtype) for _ in range(2))
    out = torch.empty(32, 32, device=device)
    _matmul[(1,)](a, b, out, 32, 32, SIZE=32)
    assert_close({"product": out}, {"product": a.double() @ b.double()}, 1e-6)


def test_memory_that_is_not_written_is_nan(device):
    with poisoned_memory():
        assert torch.empty(5, device=device).isnan().all()


def test_inputs_in_poison_have_the_same_values(device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    for view, stride in ((padded(x), 36), (strided(x), 18)):
        assert torch.equal(view, x) and view.requires_grad and not view.is_contiguous()
        assert view.stride(0) == stride
        assert view.as_strided((view.shape[0],), (view.stride(0),), view.storage_offset() - 1).isnan().all()


def test_a_nan_is_never_close(device):
    x = torch.ones(4, device=device)
    assert relative_error(x, x) == 0
    broken = x.clone()
    broken[2] = torch.nan
    assert not relative_error(broken, x) <= 1e9


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "case",
    [
        MLSTMCase(2, 64, 128, torch.float32, backend="triton"),
        SLSTMCase(2, 64, torch.float32, backend="triton"),
        HeadNormCase(2, 64, torch.float32, torch.float32, 1e-6, True, "triton"),
        LossCase(64, 100, torch.float32, torch.float32, backend="triton"),
    ],
    ids=str,
)
def test_kernels_run_where_their_inputs_are(case):
    """And not on the current device."""
    assert torch.cuda.current_device() == 0
    assert not [str(finding) for finding in compare(case, torch.device("cuda:1")) if not finding.agrees]
