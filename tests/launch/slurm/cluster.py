"""A Slurm of its own for tests: controller and nodes as processes of this machine, everything in one folder.

Nodes are named by addresses of the loopback network, so that what Slurm calls a node can be connected to. Two
partitions share them: `plain`, whose jobs are queued again in favour of those of `urgent`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel")
INSTALL = "apt-get install slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins"
_SEARCHED = os.pathsep.join(filter(None, [os.environ.get("PATH"), "/usr/sbin", "/sbin"]))

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MinJobAge=600
GresTypes=gpu
"""


def missing_programs() -> list[str]:
    """What a cluster needs and this machine lacks."""
    return [program for program in PROGRAMS if shutil.which(program, path=_SEARCHED) is None]


class Cluster:
    """Started and stopped as a context manager. `environment` is what a process needs to be its client."""

    def __init__(self, folder: Path, nodes: int = 2, gpus: int = 2):
        self.folder = folder
        self.nodes = [f"127.0.0.{number}" for number in range(1, nodes + 1)]
        self._gpus = gpus
        self._daemons: dict[str, psutil.Process] = {}

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SQUEUE"))}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        for name in ("munge", "state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        # munge refuses folders that others may write to, and its clients must pass.
        (self.folder / "munge").chmod(0o711)
        self._write_configuration()
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld.pid")
            for node in self.nodes:
                self.start_node(node)
            wait_for(lambda: set(self.states().values()) == {"idle"}, 60, self._words)
        except BaseException:
            self._stop_daemons()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            if running := self.ask("squeue", "-h", "-o", "%A").split():
                self.ask("scancel", *set(running))
                wait_for(lambda: not self.ask("squeue", "-h").strip(), 30, str)
        self._stop_daemons()

    def _write_configuration(self) -> None:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(1 + len(self.nodes))]
        ports = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        text = _CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            ports=ports,
            user=pwd.getpwuid(os.getuid()).pw_name,
            folder=self.folder,
        )
        for node, port in zip(self.nodes, ports[1:], strict=True):
            text += (
                f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=4000 "
                f"Gres=gpu:{self._gpus} State=UNKNOWN\n"
            )
        shared = "Nodes=ALL MaxTime=2:00:00 DefaultTime=10 State=UP"
        text += f"PartitionName=plain {shared} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20\n"
        text += f"PartitionName=urgent {shared} PriorityTier=9 PreemptMode=OFF\n"
        (self.folder / "slurm.conf").write_text(text)
        # Any character device will do for a GPU that nothing computes on.
        devices = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")[: self._gpus]
        lines = [f"NodeName={node} Name=gpu File={device}\n" for node in self.nodes for device in devices]
        (self.folder / "gres.conf").write_text("".join(lines))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(64))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / file}" for option, file in files.items()]
        self._start("munged", "munge/pid", *options, "--force")

    def start_node(self, node: str) -> None:
        """Start the daemon of a node, also of one that was lost."""
        self._start("slurmd", f"slurmd-{node}.pid", "-N", node)

    def _start(self, program: str, pid_file: str, *options: str) -> None:
        file = self.folder / pid_file
        file.unlink(missing_ok=True)
        path = shutil.which(program, path=_SEARCHED)
        assert path is not None, f"{program}: {INSTALL}"
        subprocess.run([path, *options], env=self.environment, check=True, timeout=60, stdin=subprocess.DEVNULL)
        wait_for(lambda: file.is_file() and file.read_text().strip().isdecimal(), 30, self._words)
        self._daemons[pid_file] = psutil.Process(int(file.read_text()))

    def _stop_daemons(self) -> None:
        # Clients of munge first.
        for daemon in reversed(self._daemons.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                daemon.terminate()
        _, alive = psutil.wait_procs([one for one in self._daemons.values() if _lives(one)], timeout=15)
        for process in [one for one in alive if _lives(one)] + list(self._of_jobs()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr, self._words())
        return done.stdout

    def states(self) -> dict[str, str]:
        """Node -> its state."""
        lines = self.ask("sinfo", "-h", "-N", "-p", "plain", "-o", "%N %T").splitlines()
        return dict(line.split() for line in lines)

    def state_of(self, job: str) -> str:
        """The state of a job, also of one that has ended."""
        return self.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def lose_node(self, node: str) -> None:
        """What a loss of power does: every process of the node is gone at once, and the node does not answer."""
        tasks = list(self._of_jobs(node))
        parents = {parent for task in tasks if (parent := task.parent()) is not None}
        stepds = [parent for parent in parents if parent.name().startswith("slurmstepd")]
        for process in [self._daemons[f"slurmd-{node}.pid"], *stepds, *tasks]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def tasks(self, node: str, word: str) -> list[psutil.Process]:
        """Processes of jobs on a node that have `word` among their arguments."""
        return [process for process in self._of_jobs(node) if word in process.cmdline()]

    def _of_jobs(self, node: str | None = None) -> Iterator[psutil.Process]:
        configuration = str(self.folder / "slurm.conf")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                is_ours = variables.get("SLURM_CONF") == configuration and "SLURM_JOB_ID" in variables
                if is_ours and node in (None, variables.get("SLURMD_NODENAME")):
                    yield process

    def _words(self) -> str:
        return "\n".join("\n".join(file.read_text().splitlines()[-15:]) for file in self.folder.glob("*.log"))


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(condition: Callable[[], object], seconds: float, words: Callable[[], str]) -> None:
    """Wait until `condition` holds. Fails with `words` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, words()
        time.sleep(0.1)


def kill(process: psutil.Process) -> None:
    """End one process without a word."""
    process.send_signal(signal.SIGKILL)
