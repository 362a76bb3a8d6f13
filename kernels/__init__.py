"""The recurrences and fused operations of an xLSTM language model, as functions on tensors.

Nothing in here knows a module, a process group or a file. Each operation has a plain PyTorch form that is its
specification.

Hugging Face distributes another package of this name, which `transformers` imports where it is installed. Both work in
one process: the modules of both are found here, and what this file does not have is looked up in the other package's
(model/kernels_package.py handles the case that the other one comes first on sys.path).
"""

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_OWN_PATH = list(__path__)
_other: ModuleType | None = None


def _find_other() -> ModuleSpec | None:
    """The other package: the first `kernels` on sys.path with a module `layer`, which no other has."""
    for entry in sys.path:
        spec = PathFinder.find_spec(__name__, [entry])
        if spec and spec.origin and PathFinder.find_spec(f"{__name__}.layer", spec.submodule_search_locations):
            return spec
    return None


def _load_other() -> ModuleType | None:
    global _other
    spec = _find_other() if _other is None else None
    if spec and spec.loader:
        # Set before it runs: its submodules ask for its version while it does.
        _other = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(_other)
        except BaseException:
            _other = None
            raise
    return _other


def __getattr__(name: str) -> object:
    is_special = name.startswith("__") and name != "__version__"
    if not is_special and PathFinder.find_spec(f"{__name__}.{name}", _OWN_PATH) is None:
        other = _load_other()
        if other is not None:
            return getattr(other, name)
        _refuse_overwritten_package(name)
    raise AttributeError(f"module 'kernels' of xlstm-pretrain has no attribute {name!r}")


def _refuse_overwritten_package(name: str) -> None:
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"'{name}' was asked of the Hugging Face package 'kernels' {version}, whose files share the directory "
        f"{_OWN_PATH[0]} with the package 'kernels' of xlstm-pretrain and were overwritten. Uninstall both and "
        "install xlstm-pretrain again, with 'pip install -e' if the Hugging Face package is needed beside it"
    )


if _found := _find_other():
    __path__.extend(_found.submodule_search_locations or [])
