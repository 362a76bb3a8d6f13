"""What to type next when a run has ended: commands to copy as they stand."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from train.config import RunConfig
from train.interpreter import python_name
from train.parallel.mesh import launched_processes
from train.run_directory import RunDirectory


def next_commands(config: RunConfig, directory: RunDirectory, is_complete: bool) -> str:
    """Where the run lies, how it goes on where it is not complete, and what may be done with it."""
    run = shlex.quote(str(directory.path))
    commands = [
        f"model generate {shlex.quote(f'checkpoint={directory.path}')} prompt='The '",
        *([f"train.evaluate {run}"] if config.evaluation.sets else []),
        f"train.report {run}",
    ]
    if not is_complete and (resume := _this_command()) is not None:
        commands.insert(0, resume)
    return "\n".join(
        [f"The run lies in {directory.path}. Next:", *(f"  {python_name()} -m {line}" for line in commands)]
    )


def _this_command() -> str | None:
    """The command line of this run; None where it is another program's, or spans several machines."""
    if Path(sys.argv[0]).name != "__main__.py" or Path(sys.argv[0]).parent.name != "train":
        return None
    overrides, processes = shlex.join(sys.argv[1:]), launched_processes()
    if processes == 1:
        return f"train {overrides}"
    if int(os.environ.get("LOCAL_WORLD_SIZE", 0)) != processes:
        return None
    return f"launch local --processes {processes} {overrides}"
