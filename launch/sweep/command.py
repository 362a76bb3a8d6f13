"""`python -m launch sweep plan|submit|status`: what they take."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import minutes, positive

if TYPE_CHECKING:
    from launch.sweep.manifest import Manifest

# Each command imports what it needs: torch takes seconds.

RUN_COMMANDS = ("plan", "submit", "status")
_WATCH_SECONDS = 5.0


# Of what `add_subparsers` returns, argparse has no public type.
def add_run_commands(parts: Any) -> None:
    """Add them to the commands of `python -m launch sweep`."""
    text = "write the manifest of a sweep, a row for each run, after checking all of them"
    plan = parts.add_parser("plan", help=text)
    plan.add_argument("--dry-run", action="store_true", help="check and print, write nothing")
    text = "take the place of a manifest that differs; rows that have begun must stay as they are"
    plan.add_argument("--replace", action="store_true", help=text)
    text = (
        "sweep=NAME (conf/sweep/NAME.yaml), sweep.KEY=VALUE, nodes, gpus_per_node, launch.*, and settings of all runs"
    )
    plan.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help=text)

    submit = parts.add_parser("submit", help="start the runs that are neither complete nor under way")
    submit.add_argument("sweep_folder", metavar="DIR", help="that `sweep plan` wrote its manifest to")
    submit.add_argument("--local", action="store_true", help="on this machine, one after another")
    text = "with --local: of each run (default: as many as it was planned for)"
    submit.add_argument("--processes", type=positive, metavar="N", help=text)
    text = "with --local: save and end after so long; the same command goes on"
    submit.add_argument("--minutes", type=minutes, metavar="N", help=text)
    submit.add_argument("--at-once", type=positive, metavar="N", help="on a cluster: runs of an array at the same time")
    submit.add_argument("--dry-run", action="store_true", help="print the batch scripts and write nothing")
    submit.add_argument("--test-only", action="store_true", help="ask Slurm whether and when it would start the jobs")
    text = "go on with the manifest though its configuration files have changed since"
    submit.add_argument("--as-planned", action="store_true", help=text)

    status = parts.add_parser("status", help="how far the runs of a sweep are")
    status.add_argument("sweep_folder", metavar="DIR", help="of a sweep")
    status.add_argument("--watch", action="store_true", help="again every few seconds, until Ctrl-C")
    status.add_argument("--json", action="store_true", help="for programs")


def run_run_command(options: argparse.Namespace) -> int:
    """Run one of them; returns the exit code. Raises ConfigError for what the user must change."""
    if options.sweep == "plan":
        from launch.sweep.plan import plan_sweep

        return plan_sweep(options.overrides, options.dry_run, options.replace)
    return _submit(options) if options.sweep == "submit" else _status(options)


def _submit(options: argparse.Namespace) -> int:
    from conf import ConfigError
    from launch.sweep.arrays import ArrayOptions, submit_arrays
    from launch.sweep.local import LocalOptions, run_locally
    from launch.sweep.manifest import SweepFolder, read_manifest
    from launch.sweep.plan import machines_of

    on_cluster = {"--at-once": options.at_once, "--dry-run": options.dry_run, "--test-only": options.test_only}
    here = {"--processes": options.processes, "--minutes": options.minutes}
    wrong = on_cluster if options.local else here
    if problems := [
        f"{option}: {'is for a cluster, without' if options.local else 'needs'} --local"
        for option, value in wrong.items()
        if value
    ]:
        raise ConfigError(problems)
    folder = SweepFolder(Path(options.sweep_folder))
    manifest = read_manifest(folder)
    if not options.as_planned and (changes := _changes(manifest)):
        raise ConfigError(
            [
                f"{folder.manifest}: its configuration has changed since it was planned; plan it again with --replace, "
                "or go on with what was planned: --as-planned",
                *changes,
            ]
        )
    machines = machines_of(manifest)
    if not options.local:
        return submit_arrays(
            folder, manifest, machines, ArrayOptions(options.at_once, options.dry_run, options.test_only)
        )
    return run_locally(folder, manifest, machines.launch, LocalOptions(options.processes, options.minutes))


def _changes(manifest: Manifest) -> list[str]:
    """How a sweep would be planned otherwise today, or why it would not be planned at all."""
    from conf import ConfigError
    from launch.sweep.plan import changes_since

    try:
        return changes_since(manifest)
    except ConfigError as error:
        return error.problems


def _status(options: argparse.Namespace) -> int:
    import json

    from launch.sweep.manifest import SweepFolder, read_manifest
    from launch.sweep.progress import as_json, progress, queue_of, table

    folder = SweepFolder(Path(options.sweep_folder))
    manifest = read_manifest(folder)
    while True:
        found = progress(folder, manifest, queue_of(folder, manifest))
        if options.json:
            print(json.dumps(as_json(found), indent=1))
        else:
            clear = "\x1b[H\x1b[J" if options.watch and sys.stdout.isatty() else ""
            print(clear + table(found), flush=True)
        if not options.watch:
            return 0
        time.sleep(_WATCH_SECONDS)
