"""A process with process groups ends without the interpreter's finalization, in which torch's threads abort it."""

import subprocess
import sys

import pytest

from tests.runs import ROOT

FINALIZED = """
import atexit, sys
from train.__main__ import end_process

class Late:
    def __del__(self):
        print("finalized", flush=True)

sys.modules["late"] = Late()
atexit.register(print, "exit handler")
sys.stdout.write("written ")
"""


@pytest.mark.parametrize(
    ("end", "shown"),
    [("end_process(3)", "written exit handler\n"), ("sys.exit(3)", "written exit handler\nfinalized\n")],
)
def test_exit_handlers_run_and_output_is_written_but_nothing_is_finalized(end, shown):
    ended = subprocess.run([sys.executable, "-c", FINALIZED + end], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 3
    assert ended.stdout == shown
