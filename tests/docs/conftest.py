"""A copy of the tree in which documented commands are run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.runs import ROOT


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return copied_tree(tmp_path_factory.mktemp("checkout"))


def copied_tree(folder: Path) -> Path:
    """The files that git tracks or would track, without those that runs leave behind."""
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("the documented commands use .venv, which `make` creates")
    target = folder / "xlstm-pretrain"
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listing.stdout.splitlines() if listing.returncode == 0 else []
    if not names:
        pytest.skip("not a git checkout")
    for name in names:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / ".venv").symlink_to(ROOT / ".venv", target_is_directory=True)
    return target
