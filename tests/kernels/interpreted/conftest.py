"""These tests run where Triton kernels do: under the interpreter, or on a CUDA device, where all are marked `gpu`."""

import pytest

from tests.kernels.triton_cases import COMPILED, DEVICE, DTYPES, INTERPRETED, poisoned_memory

if not (INTERPRETED or COMPILED):
    collect_ignore_glob = ["test_*.py"]


def pytest_itemcollected(item):
    if COMPILED:
        item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    """Every dtype that kernels compute rightly here: bfloat16 on a CUDA device only."""
    return request.param


@pytest.fixture(autouse=True)
def poison():
    """Nothing may depend on what memory held before."""
    with poisoned_memory():
        yield
