"""`python -m train.report`: the picture of a run, the page that compares several."""

from __future__ import annotations

import sys

from conf.command_line import exit_code


def _run() -> int:
    # Importing torch and matplotlib takes seconds, in which an interrupt is one line.
    from train.report.command import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_code(_run, (), "train.report: interrupted"))
