"""The batch script of a run, or of an array of runs, from the templates in slurm/."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.folder import LaunchFolder
from launch.job import ContainerConfig, Job

TEMPLATES = Path(__file__).resolve().parents[1] / "slurm"


@dataclass(frozen=True)
class Place:
    """Where a job finds its run, its code and whatever its configuration names from there. Absolute paths."""

    folder: LaunchFolder
    work: Path
    template = "train.sbatch.j2"
    command = "submit"

    @property
    def root(self) -> Path:
        """The folder that the job reads and writes."""
        return self.folder.run

    @property
    def code(self) -> Path:
        return self.folder.code

    @property
    def preflight(self) -> Path:
        return self.folder.preflight

    @property
    def output(self) -> Path:
        """Of the batch script."""
        return self.folder.run / "logs" / "slurm-%j.out"

    def variables(self, name: str) -> dict[str, str]:
        """What only its template has."""
        return {"run": str(self.folder.run), "name": name}


@dataclass(frozen=True)
class ArrayPlace:
    """The same of an array, whose tasks are runs below `root`. Absolute paths."""

    root: Path
    # Of this array.
    folder: Path
    work: Path
    template = "array.sbatch.j2"
    command = "sweep submit"

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def preflight(self) -> Path:
        return self.folder / "preflight.sh"

    @property
    def script(self) -> Path:
        return self.folder / "array.sbatch"

    @property
    def rows(self) -> Path:
        """A line for each row of the sweep, with the folder of its run: task N is the line N + 1."""
        return self.folder / "rows"

    @property
    def output(self) -> Path:
        """Of the batch script, until it knows its run."""
        return self.folder / "slurm-%A_%a.out"

    def variables(self, name: str) -> dict[str, str]:
        """What only its template has."""
        return {"rows": str(self.rows)}


def sbatch_options(job: Job, name: str, place: Place | ArrayPlace) -> list[str]:
    """The options of the script's head."""
    machines, launch = job.machines, job.machines.launch
    memory = launch.memory or ("0" if launch.exclusive else None)
    asked = {
        "job-name": name,
        "nodes": machines.nodes,
        "ntasks-per-node": job.processes_per_node,
        "gpus-per-node": machines.gpus_per_node or None,
        "cpus-per-task": launch.cpus_per_task,
        "mem": memory,
        "time": launch.time,
        "signal": f"USR1@{launch.signal_seconds}",
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "reservation": launch.reservation,
        "dependency": launch.dependency,
        "mail-user": launch.mail,
        "mail-type": ",".join(launch.mail_events) if launch.mail and launch.mail_events else None,
        "output": place.output,
        "open-mode": "append",
        "wait-all-nodes": 1,
    }
    options = [f"--{option}={_in_head(value)}" for option, value in asked.items() if value is not None]
    options += ["--exclusive"] if launch.exclusive else []
    options.append("--requeue" if launch.continuation == "requeue" else "--no-requeue")
    return options + launch.options


def _in_head(value: object) -> str:
    """As sbatch reads the value of an option in a script: it splits words as a shell does, and knows quotes."""
    text = str(value)
    return f'"{text}"' if " " in text else text


def render(job: Job, name: str, place: Place | ArrayPlace) -> str:
    """The batch script of the run, or of the array, `name`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"quote": _quoted, "quoted_words": _quoted_words}
    machines, launch = job.machines, job.machines.launch
    in_step, inside = _container(launch.container, place)
    alone = [*inside]
    if launch.container.kind == "pyxis":
        alone = ["srun", "--nodes=1", "--ntasks=1", "--overlap", *in_step]
    return environment.get_template(place.template).render(
        options=sbatch_options(job, name, place),
        command=place.command,
        work=str(place.work),
        code=str(place.code),
        preflight_script=str(place.preflight),
        setup=launch.setup,
        environment=launch.environment.items(),
        python=[sys.executable if launch.container.kind is None else launch.container.python],
        alone=alone,
        continuation=launch.continuation,
        preflight=asdict(launch.preflight),
        minutes=max(1, -(-launch.preflight.seconds // 60)),
        nodes=machines.nodes,
        gpus_per_node=machines.gpus_per_node,
        processes_per_node=job.processes_per_node,
        cpus="" if launch.cpus_per_task is None else f" --cpus-per-task={launch.cpus_per_task}",
        in_step="".join(f" {_quoted(word)}" for word in in_step),
        inside="".join(f"{_quoted(word)} " for word in inside),
        **place.variables(name),
    )


def _quoted(value: object) -> str:
    return shlex.quote(str(value))


def _quoted_words(words: Iterable[str]) -> str:
    return shlex.join(words)


def _container(container: ContainerConfig, place: Place | ArrayPlace) -> tuple[list[str], list[str]]:
    """(options of srun, words before a command) by which a process is in the container."""
    if container.kind is None:
        return [], []
    # The code is in the run's folder.
    mounts = [f"{path}:{path}" for path in dict.fromkeys((place.work, place.root))] + container.mounts
    if container.kind == "pyxis":
        image = [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
        return [*image, f"--container-workdir={place.work}", "--no-container-mount-home"], []
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return [], ["apptainer", "exec", "--nv", *binds, "--pwd", str(place.work), str(container.image)]
