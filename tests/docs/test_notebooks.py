"""A notebook runs from top to bottom."""

import json

import pytest

from tests.docs.documentation import run_python
from tests.runs import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_and_learns(notebook, tmp_path):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), "clear the outputs"
    printed = run_python(["".join(cell["source"]) for cell in code], tmp_path, ROOT)
    first, _, last = printed[printed.index("loss from ") :].split()[2:5]
    assert float(last) < float(first) - 0.5, printed
