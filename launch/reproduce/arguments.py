"""What `python -m launch reproduce` takes."""

from __future__ import annotations

import argparse
from typing import Any

from launch.arguments import minutes, positive


# Of what `add_subparsers` returns, argparse has no public type.
def add_reproduce_command(commands: Any) -> None:
    """Add `reproduce` to the commands of `python -m launch`."""
    text = "train and score many small models, and put them beside published results: parity, formal, mqar"
    command: argparse.ArgumentParser = commands.add_parser("reproduce", help=text)
    command.add_argument("name", metavar="NAME", help="conf/reproduce/NAME.yaml")
    command.add_argument("--plan", action="store_true", help="check all runs and write the manifest, start none")
    text = "only score what is trained already, and write the page"
    command.add_argument("--no-training", action="store_true", help=text)
    command.add_argument("--processes", type=positive, default=1, metavar="N", help="of each run (default: 1)")
    text = "save and end the training after so long; the same command goes on"
    command.add_argument("--minutes", type=minutes, metavar="N", help=text)
    text = "reproduce.KEY=VALUE (docs/configuration_keys.md), and settings of all runs"
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=text)
