"""The Python of docs/python.md and of the notebook is run."""

import json
import subprocess
import sys

import pytest

from tests.docs.documentation import python_blocks
from tests.runs import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("documentation")]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def run_python(pieces, folder, paths):
    """Run pieces of code one after another in one process; returns what they print. Fails where one does."""
    script = folder / "pieces.py"
    # As `launch` starts processes: what is below runs in the main process alone.
    script.write_text("\n\n".join(pieces), encoding="utf-8")
    variables = environment() | {"PYTHONPATH": str(paths), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=variables, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_python_page(shell):
    printed = run_python(python_blocks(ROOT / "docs" / "python.md"), shell.checkout, shell.checkout)
    assert "torch.Size([2, 16, 4096])" in printed
    assert (shell.checkout / "runs" / "from_python" / "checkpoints" / "step-00000002").is_dir()
    assert (shell.checkout / "corpora" / "from_python" / "manifest.json").is_file()


def test_the_python_of_the_readme(shell):
    run_python(python_blocks(ROOT / "README.md"), shell.checkout, shell.checkout)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), "clear the outputs"
    printed = run_python(["".join(cell["source"]) for cell in code], tmp_path, ROOT)
    losses = printed.split("loss from ")[1].split()
    assert float(losses[2]) < float(losses[0]) - 0.5, printed
