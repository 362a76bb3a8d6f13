"""Until when a run that is asked to stop must have ended."""

from __future__ import annotations

import time

from conf.slurm_variables import job_end


class Deadline:
    """Of one rank. Nothing is known of it before the run is told to stop, except by a Slurm job, whose time has an end.

    `seconds`: from the request to the moment at which the process is killed; None: not known.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        # In seconds of the monotonic clock.
        self._ends: list[float] = []
        self._is_known = False

    def request(self, seconds_ago: float = 0.0) -> None:
        """The run is told to stop, or was so long ago. What is said first counts. Any thread may call it."""
        if self._is_known:
            return
        self._is_known = True
        now, end = time.monotonic(), job_end()
        ends = [] if self._seconds is None else [now - seconds_ago + self._seconds]
        # One that is past is none: the job was given more time since it began.
        if end is not None and end > time.time():
            ends.append(now + end - time.time())
        self._ends = ends

    def left(self) -> float | None:
        """Seconds that are left to this process, below 0 where they are over; None: not known. Asked by a run that
        stops for another reason, it counts from now on."""
        self.request()
        return min(self._ends) - time.monotonic() if self._ends else None
