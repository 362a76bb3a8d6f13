"""That `kernels` is this project's package, wherever the Hugging Face package of that name stands on sys.path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def use_own_kernels() -> None:
    """Make `import kernels.mlstm` and the like find this project's modules from now on.

    Where no `kernels` is loaded yet, the project's is, which passes on what only the other one has. Where the other one
    is loaded already, the project's modules become its submodules.
    """
    directory = Path(__file__).resolve().parent.parent / "kernels"
    loaded = sys.modules.get("kernels")
    if loaded is None:
        spec = importlib.util.spec_from_file_location("kernels", directory / "__init__.py")
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["kernels"] = package
        spec.loader.exec_module(package)
    elif str(directory) not in loaded.__path__:
        loaded.__path__.insert(0, str(directory))
