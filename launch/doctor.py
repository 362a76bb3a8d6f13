"""`python -m launch doctor`: what this machine lacks, and the command that mends it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

PACKAGES = ("torch", "deepspeed", "hydra", "omegaconf", "jinja2", "pyarrow", "sentencepiece", "psutil")
SLURM = ("sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    # None: it is as it should be.
    problem: str | None = None
    mend: str = ""
    # Some kind of run works without it.
    is_optional: bool = False


def examine() -> int:
    """Print what was found; returns 1 where something that every run needs is missing."""
    findings = list(_findings())
    for finding in findings:
        if finding.problem is None:
            print(f"ok       {finding.what}")
            continue
        print(f"{'without ' if finding.is_optional else 'MISSING '} {finding.what}: {finding.problem}")
        print(f"           {finding.mend}")
    return int(any(finding.problem is not None and not finding.is_optional for finding in findings))


def _findings() -> Iterator[Finding]:
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    install = f"{sys.executable} -m pip install -e ."
    yield Finding("Python packages", f"{', '.join(missing)} not installed" if missing else None, install)
    yield _gpus()
    clients = [program for program in SLURM if shutil.which(program) is None]
    yield Finding(
        "Slurm's commands",
        f"{', '.join(clients)} not found, so `launch submit` works with --dry-run alone" if clients else None,
        "log in where your cluster takes jobs, or: apt-get install slurm-client",
        is_optional=True,
    )
    if not clients:
        yield _command(
            "Slurm's controller", ["scontrol", "ping"], "ask who runs the cluster; SLURM_CONF names its configuration"
        )
        yield _command(
            "Slurm's accounts (sacctmgr)", ["sacctmgr", "-n", "show", "cluster"],
            "nothing to do: launch.account and launch.qos stay null here", is_optional=True,
        )  # fmt: skip
    for program, mend in (
        ("git", "apt-get install git; without it a run does not know its revision"),
        ("apptainer", "ask who runs the cluster; only launch.container.kind=apptainer needs it"),
        ("shellcheck", "apt-get install shellcheck; only tests of the batch scripts need it"),
    ):
        problem = None if shutil.which(program) else "not found"
        yield Finding(program, problem, mend, is_optional=True)


def _gpus() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding(
            "GPUs", "nvidia-smi not found: this machine computes on the CPU",
            "on a machine with a GPU: install its driver", is_optional=True,
        )  # fmt: skip
    return _command("GPUs", ["nvidia-smi", "-L"], "reload the driver, or reboot", is_optional=True)


def _command(what: str, command: list[str], mend: str, is_optional: bool = False) -> Finding:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(what, str(error), mend, is_optional)
    words = " ".join((done.stderr or done.stdout).split())
    return Finding(what, words or f"exit code {done.returncode}" if done.returncode else None, mend, is_optional)
