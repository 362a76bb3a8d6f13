"""The recurrences and fused operations of an xLSTM language model, as functions on tensors.

Nothing in here knows a module, a process group or a file. Each operation has a plain PyTorch form that is its
specification.

Hugging Face distributes another package of this name, which `transformers` imports where it is installed. Both work in
one process: what this package does not have is looked up in that one (model/kernels_package.py handles the case that
the other one comes first on sys.path).
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_OWN_DIRECTORY = Path(__file__).resolve().parent
_ALIAS = "_huggingface_kernels"


def _huggingface_directory() -> Path | None:
    for entry in sys.path:
        directory = Path(entry).resolve() / "kernels"
        has_layers = (directory / "layer").is_dir() or (directory / "layer.py").is_file()
        if has_layers and (directory / "__init__.py").is_file() and directory != _OWN_DIRECTORY:
            return directory
    return None


def _huggingface_package() -> ModuleType | None:
    """The other package's __init__, run under an alias; its submodules are submodules of this package."""
    if _ALIAS in sys.modules:
        return sys.modules[_ALIAS]
    directory = _huggingface_directory()
    if directory is None:
        return None
    if str(directory) not in __path__:
        __path__.append(str(directory))
    spec = importlib.util.spec_from_file_location(_ALIAS, directory / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    # Its submodules ask for its version while it is still being loaded.
    sys.modules[_ALIAS] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_ALIAS]
        raise
    return module


def _is_own(name: str) -> bool:
    return (_OWN_DIRECTORY / f"{name}.py").is_file() or (_OWN_DIRECTORY / name / "__init__.py").is_file()


def __getattr__(name: str) -> object:
    is_special = name.startswith("__") and name != "__version__"
    if not is_special and not _is_own(name):
        package = _huggingface_package()
        if package is not None:
            return getattr(package, name)
        _refuse_overwritten_package(name)
    raise AttributeError(f"module 'kernels' of xlstm-pretrain has no attribute {name!r}")


def _refuse_overwritten_package(name: str) -> None:
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"'{name}' was asked of the Hugging Face package 'kernels' {version}, whose files share the directory "
        f"{_OWN_DIRECTORY} with the package 'kernels' of xlstm-pretrain and were overwritten. Uninstall both and "
        "install xlstm-pretrain again, with 'pip install -e' if the Hugging Face package is needed beside it"
    )


if _found := _huggingface_directory():
    __path__.append(str(_found))
