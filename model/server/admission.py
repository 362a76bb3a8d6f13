"""Who is let in: how many requests and sequences there are, and when another try is worth it.

Of the event loop's thread alone.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator

from model.server.errors import ApiError
from model.server.limits import Limits

MOST_SECONDS = 60
DRAINING = "the server is shutting down"


class Admission:
    """Counts of what clients hold, against the limits."""

    def __init__(self, limits: Limits):
        self._limits = limits
        # Requests that are being received, computed or sent.
        self.requests = 0
        # Sequences that wait for a slot or have one.
        self.sequences = 0
        self.draining = False
        # How long the last sequences took, from being taken on to their end.
        self._seconds: deque[float] = deque(maxlen=32)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request from its first byte to the last of its answer. Raises ApiError (429, 503)."""
        self.refuse_when_draining()
        if self.requests >= self._limits.connections:
            raise self._too_many(f"{self.requests} requests are being answered, the most that are taken on")
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def refuse_when_draining(self) -> None:
        """Raise ApiError (503) once no request is taken on any more."""
        if self.draining:
            raise ApiError(503, DRAINING, retry_after=math.ceil(self._limits.drain_seconds) + 1)

    def take_on(self, sequences: int) -> None:
        """Raises ApiError (429): slots and queue have no room for so many."""
        most = self._limits.slots + self._limits.queue
        if self.sequences + sequences > most:
            raise self._too_many(f"{self.sequences} of {most} sequences are running or wait, no room for {sequences}")
        self.sequences += sequences

    def ended(self, seconds: float) -> None:
        """A sequence left the batch after so long."""
        self.sequences -= 1
        self._seconds.append(seconds)

    def _too_many(self, text: str) -> ApiError:
        return ApiError(429, f"{text}; try again later", code="rate_limit_exceeded", retry_after=self._wait())

    def _wait(self) -> int:
        """Seconds until about half of what waits has been taken on, by how long the last sequences took."""
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
        rounds = max(0, self.sequences - self._limits.slots) / 2 / self._limits.slots
        return min(MOST_SECONDS, max(1, math.ceil(mean * rounds)))
