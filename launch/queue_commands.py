"""The commands of `python -m launch` that have to do with a cluster: submit, fork, status, logs, cancel, doctor."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from launch.arguments import positive

QUEUE_COMMANDS = ("submit", "fork", "status", "logs", "cancel", "doctor")


# Of what `add_subparsers` returns, argparse has no public type.
def add_queue_commands(commands: Any) -> None:
    """Add them to the subparsers of `python -m launch`."""
    submit = commands.add_parser("submit", help="train on a Slurm cluster: nodes=N gpus_per_node=N key=value ...")
    submit.add_argument("--dry-run", action="store_true", help="check, print the batch script and write nothing")
    submit.add_argument("--test-only", action="store_true", help="ask Slurm whether and when it would start the job")
    submit.add_argument("--config", metavar="FILE", help="a run's config.yaml: its values, with overrides on top")
    submit.add_argument("overrides", nargs="*", help="what `python -m train` takes, and nodes, gpus_per_node, launch.*")
    text = "a new run that goes on from a step of another: RUN step=N name=NAME key=value ..."
    fork = commands.add_parser("fork", help=text)
    fork.add_argument("run", metavar="RUN", help="the folder of the run to leave")
    fork.add_argument("--processes", type=positive, default=None, help="number of processes on this machine")
    fork.add_argument("--plan", action="store_true", help="check and plan the branch, print it, and start nothing")
    fork.add_argument("--dry-run", action="store_true", help="check, print the batch script and write nothing")
    fork.add_argument("--test-only", action="store_true", help="ask Slurm whether and when it would start the job")
    text = "step=N (without it: the newest checkpoint), name=NAME, and what `launch submit` takes"
    fork.add_argument("overrides", nargs="*", help=text)
    status = commands.add_parser("status", help="how far runs are, and what the queue says of them")
    status.add_argument("folder", nargs="?", default="runs", help="a run, or a folder with runs somewhere below (runs)")
    status.add_argument("--watch", action="store_true", help="again every few seconds, until Ctrl-C")
    status.add_argument("--json", action="store_true", help="for programs")
    logs = commands.add_parser("logs", help="what the processes of a run print")
    logs.add_argument("run", help="the run's folder")
    logs.add_argument("--rank", type=int, help="of this rank; without it, of the job")
    logs.add_argument("--attempt", type=int, help="of this attempt; without it, of the last one")
    logs.add_argument("--follow", action="store_true", help="go on as more is printed, in later attempts too")
    cancel = commands.add_parser("cancel", help="let a run save and end, and take its jobs out of the queue")
    cancel.add_argument("run", help="the folder of a run, or of a sweep")
    cancel.add_argument("--now", action="store_true", help="at once: what was not saved is lost")
    commands.add_parser("doctor", help="what this machine lacks, and the commands that mend it")


def run_queue_command(options: argparse.Namespace) -> int:
    """Run one of them; returns the exit code."""
    # Each imports what it needs: torch takes seconds.
    if options.command == "submit":
        from launch.submit import Submission, submit

        base = None if options.config is None else Path(options.config)
        return submit(Submission(options.overrides, base, options.dry_run, options.test_only))
    if options.command == "fork":
        from launch.fork import Fork, fork

        given = Fork(Path(options.run), options.overrides, options.processes, options.plan)
        return fork(dataclasses.replace(given, dry_run=options.dry_run, test_only=options.test_only))
    if options.command == "status":
        from launch.status import show_status

        return show_status(Path(options.folder), options.watch, options.json)
    if options.command == "logs":
        from launch.logs import show_logs

        return show_logs(Path(options.run), options.rank, options.attempt, options.follow)
    if options.command == "cancel":
        from launch.cancel import cancel

        return cancel(Path(options.run), options.now)
    from launch.doctor import examine

    return examine()
