"""Runs the tests of interpreted/ under Triton's interpreter, on a CPU, each file in processes of its own.

The interpreter is chosen by an environment variable when Triton is imported; it must not leak into other tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import PATIENCE, ROOT, environment

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))

pytest.importorskip("triton", reason="Triton is not installed on this platform")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted(file):
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "run tests/kernels/interpreted itself under the interpreter"
    command = [sys.executable, "-m", "pytest", str(FOLDER / file), "-q", "-p", "no:cacheprovider", "--tb=short"]
    # A GPU, where there is one, is for the compiled kernels.
    variables = environment() | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
