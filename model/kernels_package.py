"""That `kernels` is this project's package, wherever the Hugging Face package of that name stands on sys.path."""

import sys
from importlib import import_module
from pathlib import Path


def use_own_kernels() -> None:
    """Make `import kernels.mlstm` and the like find this project's modules from now on.

    Where no `kernels` is loaded yet, the project's is, which passes on what only the other one has. Where the other one
    is loaded already, the project's modules become its submodules.
    """
    root = Path(__file__).resolve().parent.parent
    if "kernels" not in sys.modules:
        sys.path.insert(0, str(root))
        try:
            import_module("kernels")
        finally:
            sys.path.remove(str(root))
    paths = sys.modules["kernels"].__path__
    if str(root / "kernels") not in map(str, paths):
        paths.insert(0, str(root / "kernels"))
