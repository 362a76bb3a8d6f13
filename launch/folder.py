"""What `launch submit` and its jobs keep in a run's folder, below `launch/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.run_directory import EVENTS_FORMAT_VERSION, EventLog, read_versioned_lines


class LaunchFolder:
    """Paths below a run's folder. Making the object creates nothing."""

    def __init__(self, run: Path):
        self.run = run
        self.path = run / "launch"
        # What was asked for, and the configuration of the run, resolved.
        self.job = self.path / "job.json"
        self.config = self.path / "config.yaml"
        self.script = self.path / "train.sbatch"
        self.preflight = self.path / "preflight.sh"
        # The packages as they were when the run was submitted.
        self.code = self.path / "code"
        # Slurm's numbers of the jobs of the last submission, one a line.
        self.jobs = self.path / "jobs"
        self.cancelled = self.path / "cancelled"
        self.attempts = self.path / "attempts.jsonl"

    def logs(self, attempt: int) -> Path:
        """What the processes of one attempt print, a file each."""
        return self.run / "logs" / f"attempt-{attempt}"

    def job_numbers(self) -> list[str]:
        """Slurm's numbers of the jobs of the last submission."""
        return self.jobs.read_text(encoding="utf-8").split() if self.jobs.is_file() else []

    def history(self) -> list[dict[str, Any]]:
        """What happened to the run's jobs, oldest first."""
        if not self.attempts.is_file():
            return []
        return [line for line in read_versioned_lines(self.attempts, EVENTS_FORMAT_VERSION)[1:] if "event" in line]

    def since_submission(self) -> list[dict[str, Any]]:
        """`history` after the last submission."""
        history = self.history()
        last = max((place for place, line in enumerate(history) if line["event"] == "submit"), default=-1)
        return history[last + 1 :]

    def note(self, kind: str, **fields: Any) -> None:
        """Add one line to `history`."""
        EventLog(self.attempts, is_main=True).append(kind, **fields)
