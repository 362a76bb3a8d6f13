"""What a shell calls this interpreter, for commands to copy as they stand."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def python_name() -> str:
    """How a shell in this folder calls this interpreter: by its short name where that is the one on the PATH."""
    found = shutil.which("python")
    if found is not None and Path(found).absolute() == Path(sys.executable).absolute():
        return "python"
    path = Path(sys.executable)
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
