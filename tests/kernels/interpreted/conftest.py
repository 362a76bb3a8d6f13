"""These tests run where Triton kernels do: under the interpreter, or on a CUDA device, where all are marked `gpu`."""

import functools
import inspect

import pytest

from tests.kernels.triton_cases import COMPILED, DEVICE, DTYPES, INTERPRETED, poisoned_memory

if not (INTERPRETED or COMPILED):
    collect_ignore_glob = ["test_*.py"]


def _remember_what_does_not_change():
    """Triton's interpreter looks up at every operation, and every call of a function within a kernel, what is the same
    every time: half of its time. Where a version of Triton has other names for it, that costs time and no test.
    """
    from triton.language.core import block_type, dtype, is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package, builder, scope):
        for name in builtins(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = patch_builtin
    if hasattr(interpreter, "_get_np_dtype"):
        original = interpreter._get_np_dtype
        of_scalar = functools.cache(original)

        def np_dtype(tt_dtype):
            # A block's is that of its elements; types of pointers have no hash.
            element = tt_dtype.element_ty if isinstance(tt_dtype, block_type) else tt_dtype
            return of_scalar(element) if type(element) is dtype else original(element)

        interpreter._get_np_dtype = np_dtype


if INTERPRETED:
    _remember_what_does_not_change()


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
