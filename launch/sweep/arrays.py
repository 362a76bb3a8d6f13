"""`python -m launch sweep submit` on a cluster: the runs of a sweep as arrays of Slurm jobs."""

from __future__ import annotations

import json
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf import ConfigError
from launch import slurm
from launch.folder import LaunchFolder
from launch.job import Job, LaunchConfig, SubmitConfig
from launch.script import TEMPLATES, ArrayPlace, render
from launch.submit import copy_code
from launch.sweep.local import holding
from launch.sweep.manifest import Manifest, Row, SweepFolder
from launch.sweep.progress import DONE, Progress, progress
from launch.sweep.rows import configs_of, prepare
from train.config import RunConfig
from train.interpreter import python_name
from train.run_directory import write_atomically

# Slurm's number of an array, once it is queued; the tasks of the array, as indices of rows.
_JOB, _TASKS = "job", "tasks.json"


@dataclass(frozen=True)
class ArrayOptions:
    """How runs are submitted."""

    # Of each array; None: as many as the cluster has room for.
    at_once: int | None = None
    # Print the scripts, without Slurm; or ask the scheduler. Neither starts anything.
    dry_run: bool = False
    test_only: bool = False


@dataclass(frozen=True)
class Array:
    """Runs that go into one array: with the same machines, and waiting for the same trunk."""

    machines: SubmitConfig
    # Indices of rows.
    tasks: list[int]
    # The row that they wait for, where its checkpoints are not all there yet.
    trunk: Row | None

    @property
    def job(self) -> Job:
        return Job([], None, self.machines)


def submit_arrays(folder: SweepFolder, manifest: Manifest, machines: SubmitConfig, options: ArrayOptions) -> int:
    """Queue every run that is neither complete nor in the queue; returns 0.

    Raises ConfigError with whatever is wrong, before anything is written.
    """
    if options.dry_run:
        _print_scripts(folder, _arrays(manifest, progress(folder, manifest), machines), manifest)
        return 0
    with holding(folder):
        queue = slurm.queue()
        adopt(folder, manifest, queue)
        found = progress(folder, manifest, queue)
        arrays = _arrays(manifest, found, machines)
        configs = configs_of(folder, [one.row for one in found if one.is_hole])
        problems = list(dict.fromkeys(problem for array in arrays for problem in slurm.misfits(array.job)))
        if arrays and (largest := max(task for array in arrays for task in array.tasks)) > (limit := _largest_task()):
            problems.append(
                f"sweep: row {largest} is beyond the {limit + 1} tasks that an array may have here "
                "(MaxArraySize); cut the sweep in two"
            )
        if problems:
            raise ConfigError(problems)
        if options.test_only:
            for array in arrays:
                print(slurm.test(render(array.job, manifest.name, _place(folder))))
            return 0
        for array in arrays:
            slurm.test(render(array.job, manifest.name, _place(folder)))
        for array in arrays:
            print(_queue(folder, manifest, array, configs, options.at_once))
    count = sum(len(array.tasks) for array in arrays)
    complete = sum(one.state == DONE for one in found)
    _say(
        f"{count} runs are submitted in {len(arrays)} arrays, {complete} of {len(found)} are complete. Next:\n"
        f"  {python_name()} -m launch sweep status {folder.path} --watch"
    )
    return 0


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _arrays(manifest: Manifest, found: Sequence[Progress], machines: SubmitConfig) -> list[Array]:
    """The holes in as few arrays as their machines and trunks allow; trunks come before their branches."""
    complete = {one.row.name for one in found if one.state == DONE}
    arrays: dict[tuple[int, str | None], Array] = {}
    for index, one in enumerate(found):
        if not one.is_hole:
            continue
        waits_for = None if one.row.parent in complete else one.row.parent
        trunk = None if waits_for is None else manifest.row(waits_for)
        key = (one.row.nodes, waits_for)
        if key not in arrays:
            own = SubmitConfig(one.row.nodes, machines.gpus_per_node, machines.processes_per_node, machines.launch)
            arrays[key] = Array(own, [], trunk)
        arrays[key].tasks.append(index)
    return sorted(arrays.values(), key=lambda array: array.trunk is not None)


def _print_scripts(folder: SweepFolder, arrays: Sequence[Array], manifest: Manifest) -> None:
    for array in arrays:
        print(render(array.job, manifest.name, _place(folder)), end="")
        after = f" after {array.trunk.name}" if array.trunk is not None else ""
        _say(f"--array={ranges(array.tasks)}: {len(array.tasks)} runs{after}; nothing was written or submitted")


def _place(folder: SweepFolder) -> ArrayPlace:
    """Of the next array. Its folder, after which the array is named, has a name that no other sweep has."""
    root = folder.path.resolve()
    number = 1 + max((int(path.name.partition("-")[0]) for path in folder.submissions.glob("[0-9]*-*")), default=0)
    return ArrayPlace(root, root / folder.submissions.name / f"{number:04d}-{uuid.uuid4().hex[:6]}", Path.cwd())


def _queue(
    folder: SweepFolder, manifest: Manifest, array: Array, configs: dict[str, RunConfig], at_once: int | None
) -> str:
    """Write what an array needs, and queue it; returns Slurm's number of it."""
    place, launch = _place(folder), array.machines.launch
    place.folder.mkdir(parents=True)
    copy_code(place.code)
    shutil.copy(TEMPLATES / "preflight.sh", place.preflight)
    write_atomically(place.rows, "".join(f"{place.root / folder.runs.name / row.name}\n" for row in manifest.rows))
    script = render(array.job, name_of(manifest, place.folder), place)
    write_atomically(place.script, script, mode=0o777)
    # Before sbatch: whoever is interrupted behind it finds the array by its name.
    write_atomically(place.folder / _TASKS, json.dumps(array.tasks))
    for task in array.tasks:
        row = manifest.rows[task]
        prepare(folder, row, configs[row.name], launch, array.job.processes_per_node)
    throttle = "" if at_once is None else f"%{at_once}"
    options = [f"--array={ranges(array.tasks)}{throttle}", *_dependency(folder, array.trunk, launch)]
    number = slurm.submit(str(place.script), *options)
    _note_job(folder, place, number)
    return number


def name_of(manifest: Manifest, submission: Path) -> str:
    """What Slurm calls the array of a submission: no other array of the sweep has this name."""
    return f"{manifest.name}-{submission.name}"


def _dependency(folder: SweepFolder, trunk: Row | None, launch: LaunchConfig) -> list[str]:
    """The options by which branches wait for their trunk, beside what all jobs wait for."""
    if trunk is None:
        return []
    jobs = LaunchFolder(folder.run(trunk)).job_numbers()
    if not jobs:
        raise ConfigError(
            [f"{trunk.name}: is under way, but in no job of Slurm; wait until it is complete, then submit its branches"]
        )
    also = [] if launch.dependency is None else [launch.dependency]
    return [f"--dependency={','.join([*also, f'afterok:{jobs[-1]}'])}", "--kill-on-invalid-dep=yes"]


def _note_job(folder: SweepFolder, place: ArrayPlace, number: str) -> None:
    """Tell each run its job. By the array's own list of rows: the manifest may have got others since."""
    runs = place.rows.read_text(encoding="utf-8").splitlines()
    for task in json.loads((place.folder / _TASKS).read_text(encoding="utf-8")):
        write_atomically(LaunchFolder(folder.run(Path(runs[task]).name)).jobs, f"{number}_{task}\n")
    write_atomically(place.folder / _JOB, number)


def adopt(folder: SweepFolder, manifest: Manifest, queue: Sequence[slurm.QueuedJob]) -> None:
    """Find the arrays whose number was not written down: the command was killed behind sbatch."""
    for submission in sorted(folder.submissions.glob("[0-9]*-*")):
        if (submission / _JOB).is_file() or not (submission / _TASKS).is_file():
            continue
        name = name_of(manifest, submission)
        numbers = {job.number.partition("_")[0] for job in queue if job.name == name}
        for number in sorted(numbers)[:1]:
            _note_job(folder, ArrayPlace(folder.path, submission, Path.cwd()), number)
            _say(f"array {number} was queued by a command that was interrupted; its runs are not queued again")


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers as `sbatch --array` takes them: 0-3,7."""
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in _runs_of(sorted(numbers)))


def _runs_of(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = last = numbers[0]
    for number in numbers[1:]:
        if number != last + 1:
            yield first, last
            first = number
        last = number
    yield first, last


def _largest_task() -> int:
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", slurm.ask("scontrol", "show", "config"))
    return int(found[1]) - 1 if found else 1000
