"""One cluster for the tests of a process, and whatever they ask of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.slurm.cluster import INSTALL, Cluster, missing_programs
from tests.runs import ROOT, environment


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)} on this machine: {INSTALL}")
    with Cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture
def launch(cluster, tmp_path):
    """`python -m launch` as a client of the cluster; returns the finished process."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        variables = environment() | {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
        command = [sys.executable, "-m", "launch", *arguments]
        return subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert (ROOT / "launch" / "__main__.py").is_file()
    return run


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """Of the run that `tiny_run` names."""
    return tmp_path / "run"
