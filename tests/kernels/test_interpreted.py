"""Runs the tests of interpreted/ under Triton's interpreter, on a CPU, each file in a process of its own.

The interpreter is chosen by an environment variable when Triton is imported; it must not leak into other tests.
"""

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.runs import ROOT, environment

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
PROCESSES = 2

pytest.importorskip("triton", reason="Triton is not installed on this platform")


def run(file: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", str(FOLDER / file), "-q", "-p", "no:cacheprovider", "--tb=short"]
    # A GPU, where there is one, is for the compiled kernels.
    variables = environment() | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=560)


@pytest.fixture(scope="module")
def runs(request) -> dict[str, Future]:
    """The runs of all selected files, started together."""
    selected = [item.callspec.params["file"] for item in request.session.items if item.path == Path(__file__)]
    pool = ThreadPoolExecutor(PROCESSES)
    yield {file: pool.submit(run, file) for file in selected}
    pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted(runs, file):
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "run tests/kernels/interpreted itself under the interpreter"
    done = runs[file].result()
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
