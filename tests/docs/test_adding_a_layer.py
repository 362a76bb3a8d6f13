"""docs/adding_a_layer.md shows the file that its commands use, and what it checks holds.

Its commands are run with those of the other pages (test_documented_commands.py).
"""

from tests.docs.documentation import python_blocks, run_python
from tests.runs import ROOT

PAGE = ROOT / "docs" / "adding_a_layer.md"
EXAMPLE = ROOT / "docs" / "examples" / "leaky_average.py"


def test_the_pieces_of_the_page_are_the_file():
    *pieces, check = python_blocks(PAGE)
    assert "\n\n".join(pieces) == EXAMPLE.read_text(encoding="utf-8")
    assert len(pieces) == 3 and "register(LeakyAverageKind())" in pieces[-1] and "assert" in check


def test_what_the_page_checks_holds(tmp_path):
    assert run_python(python_blocks(PAGE), tmp_path, ROOT).splitlines()[-1] == "all three hold"
