"""How long a rank is busy in each phase of its steps, apart from what it waits for others in collectives of the mesh.

By the host's clock; of forward passes on a GPU by the GPU's own, which nobody waits for: what is done there is read
later.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch


class PhaseClock:
    """Seconds by phase since the start of the process. For the thread that trains alone."""

    def __init__(self, device: torch.device | None = None, on_device: tuple[str, ...] = ()):
        """`on_device`: phases whose work a GPU does while the host is elsewhere."""
        self._on_device = on_device if device is not None and device.type == "cuda" else ()
        self._seconds: dict[str, float] = {}
        self._phase = ""
        self._since = time.perf_counter()
        self._waits = False
        # Spans on the GPU that were begun, and perhaps not passed yet: phase, sign, events at its ends.
        self._pending: deque[tuple[str, float, Any, Any]] = deque()
        self._begun: Any = None

    def enter(self, phase: str) -> None:
        """One phase ends and another begins."""
        now = time.perf_counter()
        self._add(now - self._since)
        self._phase, self._since = phase, now
        self._begun = self._mark() if phase in self._on_device else None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside waits for other ranks."""
        if self._waits:
            # A collective in another: it is left out as it is.
            yield
            return
        self._waits, before = True, time.perf_counter()
        begun = self._mark() if self._begun is not None else None
        try:
            yield
        finally:
            self._waits = False
            self._since += time.perf_counter() - before
            if begun is not None:
                self._pending.append((self._phase, -1.0, begun, self._mark()))

    def seconds(self) -> dict[str, float]:
        """By phase, of all that has ended."""
        while self._pending and self._pending[0][3].query():
            phase, sign, begun, ended = self._pending.popleft()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + sign * begun.elapsed_time(ended) / 1000
        return dict(self._seconds)

    def _add(self, seconds: float) -> None:
        if self._begun is not None:
            self._pending.append((self._phase, 1.0, self._begun, self._mark()))
        else:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + seconds

    def _mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
