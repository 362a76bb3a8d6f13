"""What a batch script asks about its run: whether to begin, which nodes are unfit, what follows an attempt.

    python -m launch.attempts begin RUN          prints the attempt's number
    python -m launch.attempts judge RUN          prints the unfit nodes
    python -m launch.attempts settle RUN CODE    prints nodes to leave out of the next attempt

The exit code is the answer: 0 go on, 10 the run needs no further attempt, 11 it is given up. A judgement of 1 wants
another attempt without the nodes. Imports no torch, so that it takes no time of all nodes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from conf.slurm_variables import job_identity, job_nodes
from launch.folder import LaunchFolder
from model.marker import is_marked
from train.run_directory import RunDirectory, read_lines
from train.watch.ends import first_failure, read_ends

GO_ON, DONE, GIVEN_UP = 0, 10, 11
UNFIT = 1
# What srun says of the first task that it lost.
_TASK = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)\S*: (?P<what>.+)")
_MOST = 400


class Answer(NamedTuple):
    """What follows: GO_ON, DONE or GIVEN_UP. `text`: why; of an attempt that begins, its number."""

    code: int
    text: str


@dataclass(frozen=True)
class Failure:
    """What failed first in an attempt."""

    rank: int | None
    node: str | None
    message: str

    def __str__(self) -> str:
        who = "" if self.rank is None else f"rank {self.rank} on node {self.node}: "
        return who + (self.message if len(self.message) <= _MOST else f"{self.message[:_MOST]}...")


def newest_step(run: RunDirectory) -> int | None:
    """The steps of the newest checkpoint that is complete by its marker."""
    return max((int(path.name[5:]) for path in run.checkpoints.glob("step-*") if is_marked(path)), default=None)


def is_complete(run: RunDirectory, since: str = "") -> bool:
    """Whether the run has ended as it should, after the time `since`: it may have been made longer."""
    ends = [line for line in read_lines(run.events) if line.get("event") in ("complete", "start", "resume")]
    return bool(ends) and ends[-1]["event"] == "complete" and ends[-1]["time"] >= since


def begin(folder: LaunchFolder) -> int:
    """`open_attempt` for a batch script: prints the attempt's number, or why there is none."""
    answer = open_attempt(folder)
    if answer.code == GO_ON:
        print(answer.text)
    else:
        print(f"launch: {answer.text}", file=sys.stderr)
    return answer.code


def open_attempt(folder: LaunchFolder) -> Answer:
    """Note one more attempt, unless there is nothing to do."""
    run = RunDirectory(folder.run)
    if folder.cancelled.exists():
        return _note(folder, DONE, "the run was cancelled; submit it again to go on")
    history = folder.since_submission()
    started = [line for line in history if line["event"] == "begin"]
    if started and is_complete(run, started[0]["time"]):
        return _note(folder, DONE, "the run is complete")
    if (problem := _stuck(folder, history, run)) is not None:
        return _note(folder, GIVEN_UP, problem)
    attempt = sum(line["event"] == "begin" for line in folder.history()) + 1
    folder.note("begin", attempt=attempt, job=job_identity(), nodes=job_nodes(), checkpoint=newest_step(run))
    folder.logs(attempt).mkdir(parents=True, exist_ok=True)
    return Answer(GO_ON, str(attempt))


def _stuck(folder: LaunchFolder, history: Sequence[dict[str, Any]], run: RunDirectory) -> str | None:
    """Why the run is given up; None while it gets on."""
    limit = _settings(folder)["attempts_without_progress"]
    newest, vain = newest_step(run), 0
    started = [line for line in history if line["event"] == "begin"]
    while vain < len(started) and started[-1 - vain]["checkpoint"] == newest:
        vain += 1
    if vain < limit:
        return None
    where = "its beginning" if newest is None else f"step {newest}"
    failure = failure_of(folder, started[-1])
    return (
        f"given up after {vain} attempts without a new checkpoint since {where} "
        f"(launch.attempts_without_progress={limit}); the last one failed first in {failure}"
    )


def failure_of(folder: LaunchFolder, attempt: dict[str, Any]) -> Failure:
    """What failed first in the attempt that `attempt`, its line of the history, began."""
    run, logs = RunDirectory(folder.run), folder.logs(attempt["attempt"])
    errors = [
        line for line in read_lines(run.events) if line.get("event") == "error" and line["time"] >= attempt["time"]
    ]
    if errors:
        rank = errors[-1].get("rank")
        # The event of a start that could not say it itself has no rank.
        if errors[-1].get("kind") != "gone" or errors[-1].get("process"):
            return Failure(rank, _node_of(folder, attempt, rank), str(errors[-1].get("message")))
    identity = run.lock.read_text(encoding="utf-8").rpartition("attempt ")[2] if run.lock.is_file() else ""
    # Of this attempt, where the lock is of its time.
    if identity and (first := first_failure(read_ends(run, identity))) is not None:
        return Failure(first.rank, _node_of(folder, attempt, first.rank), first.message)
    told = logs / "srun.err"
    if found := _TASK.search(told.read_text(encoding="utf-8", errors="replace") if told.is_file() else ""):
        return Failure(int(found["rank"]), found["node"], found["what"])
    for line in reversed(folder.history()):
        if line.get("attempt") == attempt["attempt"] and line["event"] == "unfit":
            node, problem = next(iter(line["nodes"].items()))
            return Failure(None, node, f"the check of node {node}: {problem}")
    return Failure(None, None, f"none that left a word; see {logs}")


def _node_of(folder: LaunchFolder, attempt: dict[str, Any], rank: int | None) -> str | None:
    """Ranks fill one node after the other."""
    nodes, each = attempt["nodes"], _settings(folder)["processes_per_node"]
    return nodes[rank // each] if rank is not None and rank // each < len(nodes) else None


def _settings(folder: LaunchFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(folder.job.read_text(encoding="utf-8"))
    return found


def judge(folder: LaunchFolder) -> int:
    """Print the nodes of this attempt that the preflight found unfit."""
    attempt = [line for line in folder.history() if line["event"] == "begin"][-1]
    unfit = unfit_nodes(folder.logs(attempt["attempt"]) / "nodes", attempt["nodes"])
    if not unfit:
        return GO_ON
    folder.note("unfit", attempt=attempt["attempt"], nodes=unfit)
    for node, problem in unfit.items():
        print(f"launch: node {node} is unfit: {problem}", file=sys.stderr)
    print(",".join(unfit))
    return UNFIT


def unfit_nodes(reports: Path, nodes: Sequence[str]) -> dict[str, str]:
    """Node -> what is wrong with it, by what slurm/preflight.sh wrote there."""
    found = {node: _report(reports / node) for node in nodes}
    unfit = {node: "no answer" for node, lines in found.items() if "checked" not in lines}
    for node, lines in found.items():
        problems = [line.removeprefix("problem ") for line in lines if line.startswith("problem ")]
        if problems and node not in unfit:
            unfit[node] = "; ".join(problems)
    versions = {
        node: frozenset(line.removeprefix("version ") for line in lines if line.startswith("version "))
        for node, lines in found.items()
        if node not in unfit
    }
    # What most nodes have is right; of two that differ, the first.
    usual = Counter(versions.values()).most_common(1)
    for node, own in versions.items():
        if own != usual[0][0]:
            unfit[node] = f"has {', '.join(sorted(own - usual[0][0]))}; others {', '.join(sorted(usual[0][0] - own))}"
    return unfit


def _report(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def settle(folder: LaunchFolder, code: int) -> int:
    """`close_attempt` for a batch script: says what follows, and prints the nodes to leave out of the next attempt."""
    answer = close_attempt(folder, code)
    if answer.code != GO_ON:
        print(f"launch: {answer.text}", file=sys.stderr)
        return answer.code
    attempt = [line for line in folder.since_submission() if line["event"] == "begin"][-1]
    print(f"launch: attempt {attempt['attempt']}: {answer.text}; the run goes on in another", file=sys.stderr)
    print(",".join(_failing_nodes(folder)))
    return answer.code


def close_attempt(folder: LaunchFolder, code: int) -> Answer:
    """Note how the attempt that has ended with `code` ended, and what follows."""
    run, history = RunDirectory(folder.run), folder.since_submission()
    attempt = [line for line in history if line["event"] == "begin"][-1]
    if is_complete(run, "" if code == 0 else attempt["time"]):
        return _end(folder, attempt, DONE, "the run is complete")
    if folder.cancelled.exists():
        return _end(folder, attempt, DONE, "the run was cancelled, and has saved")
    if code == 0:
        return _end(folder, attempt, *_unless_stuck(folder, history, run, "stopped on request"))
    failure = failure_of(folder, attempt)
    fields: dict[str, Any] = {"code": code, "rank": failure.rank, "node": failure.node}
    if code == 2:
        problem = f"the run refuses its configuration or its data: {failure}; see {folder.logs(attempt['attempt'])}"
        return _end(folder, attempt, GIVEN_UP, problem, **fields)
    return _end(folder, attempt, *_unless_stuck(folder, history, run, f"failed first in {failure}"), **fields)


def _unless_stuck(
    folder: LaunchFolder, history: Sequence[dict[str, Any]], run: RunDirectory, reason: str
) -> tuple[int, str]:
    problem = _stuck(folder, history, run)
    return (GO_ON, reason) if problem is None else (GIVEN_UP, problem)


def _end(folder: LaunchFolder, attempt: dict[str, Any], answer: int, reason: str, **fields: Any) -> Answer:
    folder.note("end", attempt=attempt["attempt"], reason=reason, **fields)
    return Answer(answer, reason) if answer == GO_ON else _note(folder, answer, reason)


def _failing_nodes(folder: LaunchFolder) -> list[str]:
    """Nodes to leave out: those that were unfit, and those that failed first too often."""
    history, limit = folder.since_submission(), _settings(folder)["exclude_after"]
    failed = Counter(line["node"] for line in history if line["event"] == "end" and line.get("node"))
    unfit = {node for line in history if line["event"] == "unfit" for node in line["nodes"]}
    return sorted(unfit | {node for node, times in failed.items() if limit and times >= limit})


def _note(folder: LaunchFolder, code: int, reason: str) -> Answer:
    folder.note("given_up" if code == GIVEN_UP else "done", reason=reason)
    return Answer(code, reason)


def main(arguments: list[str]) -> int:
    command, run, *rest = arguments
    folder = LaunchFolder(Path(run))
    if command == "begin":
        return begin(folder)
    return judge(folder) if command == "judge" else settle(folder, int(rest[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
