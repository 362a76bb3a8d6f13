"""Runs the tests of interpreted/ under Triton's interpreter, on a CPU, in processes of their own.

The interpreter is chosen by an environment variable when Triton is imported; it must not leak into other tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import PATIENCE, ROOT, environment

FOLDER = Path(__file__).parent / "interpreted"
LONGEST = "test_mlstm_chunkwise.py"
# Of what `make test-long` alone runs, the kernels are compiled, or used by another test, in `make test` too.
MORE = ["test_preflight.py", "test_triton_decoding.py", "test_triton_head_norm.py", "test_triton_slstm.py"]
OTHERS = sorted(path.name for path in FOLDER.glob("test_*.py") if path.name not in [LONGEST, *MORE])
# Tests of the longest file whose names have one of these words take half of its time.
HALF = "shapes or slices or regimes or memory or gates or halves"
# File names and further arguments. Of about the same length: a process takes four seconds until its first test.
GROUPS = {
    "mlstm, numbers": ([LONGEST], ["-k", HALF]),
    "mlstm, others": ([LONGEST], ["-k", f"not ({HALF})"]),
    "others": (OTHERS, []),
    "more": (MORE, []),
}

pytest.importorskip("triton", reason="Triton is not installed on this platform")


@pytest.mark.slow
@pytest.mark.parametrize("group", [pytest.param(name, marks=[pytest.mark.long] * (name == "more")) for name in GROUPS])
def test_interpreted(group):
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "run tests/kernels/interpreted itself under the interpreter"
    names, arguments = GROUPS[group]
    files = [str(FOLDER / name) for name in names]
    command = [sys.executable, "-m", "pytest", *files, *arguments, "-q", "-p", "no:cacheprovider", "--tb=short"]
    # A GPU, where there is one, is for the compiled kernels.
    variables = environment() | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
