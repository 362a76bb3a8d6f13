"""One copy of the tree in which all documented commands are run, one after another."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs.documentation import Shell, blocks
from tests.runs import ROOT


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """The files that git tracks or would track, without those that runs leave behind."""
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("the documented commands use .venv, which `make` creates")
    target = tmp_path_factory.mktemp("checkout") / "xlstm-pretrain"
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


@pytest.fixture(scope="session")
def shell(checkout) -> Shell:
    """Has run what the README shows after `make`: corpora/first and runs/first exist."""
    shell = Shell(checkout)
    shell.printed = "".join(shell.run(block) for block in blocks(ROOT / "README.md")[1:])
    return shell
