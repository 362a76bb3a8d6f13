"""`python -m train.evaluate`: held-out losses of a trained model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from conf.command_line import exit_code
from conf.lasting_output import lasting_output
from conf.slurm_variables import become_rank


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code. What it finds is written to a file, whether anyone reads its output or
    not."""

    def run() -> int:
        # Importing torch takes seconds, in which an interrupt is one line.
        from train.evaluate import command

        return command.main(arguments)

    become_rank()
    with lasting_output():
        return exit_code(run, (), "train.evaluate: interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
