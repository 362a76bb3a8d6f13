"""What a preparation tells a person while it runs: share done, MB/s, time left, documents and tokens so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, MutableSequence

from tqdm import tqdm

# Seconds between two lines where no bar can be drawn, between two looks at the meters, and at what others finished.
PLAIN_INTERVAL = 15.0
TICK_INTERVAL = 0.5
RESCAN_INTERVAL = 10.0
# Numbers of a meter: bytes read of the unit in work; documents and tokens written in all; the unit in work and the
# place in it of the input that is read, both counted from 1, 0 in between.
METER_LENGTH = 5


class Meter:
    """Where one worker counts; `numbers` may lie in memory shared with the process that shows the progress."""

    def __init__(self, numbers: MutableSequence[int], tick: Callable[[], None] = lambda: None):
        self._numbers = numbers
        self._tick = tick

    def begin_input(self, unit: int, place: int) -> None:
        """The input at `place` of `unit` is read from now on, both counted from 0."""
        self._numbers[3:5] = [unit + 1, place + 1]

    def add_bytes(self, count: int) -> None:
        """Some bytes of the input have been read."""
        self._numbers[0] += count
        self._tick()

    def add_documents(self, documents: int, tokens: int) -> None:
        """Some documents have become tokens."""
        self._numbers[1] += documents
        self._numbers[2] += tokens
        self._tick()

    def end_unit(self) -> None:
        """The unit in work is finished, or given up."""
        self._numbers[0] = 0
        self._numbers[3:5] = [0, 0]


class Progress:
    """A bar on a terminal, a line now and then elsewhere.

    `unit_bytes`: bytes on disk of every unit; when all are 0, documents are counted. `finished`: the numbers of all
    finished units, whoever finished them. `meters`: the numbers of this command's workers.
    """

    def __init__(
        self,
        unit_bytes: list[int],
        finished: Callable[[], set[int]],
        meters: list[MutableSequence[int]],
        log: Callable[[str], None],
        shown: bool,
    ):
        self._unit_bytes = unit_bytes
        self._total = sum(unit_bytes)
        self._finished = finished
        self._meters = meters
        self._log = log
        self._units_done = 0
        self._finished_bytes = 0
        self._rescan()
        self._start_bytes = self._done = self._finished_bytes
        self._started = self._last_line = self._last_scan = time.monotonic()
        self._last_tick = 0.0
        self._shown = shown
        self._plain = shown and not sys.stderr.isatty()
        self._bar = tqdm(
            total=self._total or None,
            initial=self._done,
            unit="B" if self._total else "document",
            unit_scale=True,
            desc="preparing",
            disable=not shown or self._plain,
            dynamic_ncols=True,
        )

    def _rescan(self) -> None:
        finished = self._finished()
        self._units_done = len(finished)
        self._finished_bytes = sum(self._unit_bytes[number] for number in finished)

    def tick(self) -> None:
        """Show the present state, unless that was done a moment ago."""
        now = time.monotonic()
        if not self._shown or now - self._last_tick < TICK_INTERVAL:
            return
        self._last_tick = now
        writes_line = self._plain and now - self._last_line > PLAIN_INTERVAL
        if writes_line or now - self._last_scan > RESCAN_INTERVAL:
            self._last_scan = now
            self._rescan()
        documents = sum(meter[1] for meter in self._meters)
        tokens = sum(meter[2] for meter in self._meters)
        before = self._done if self._total else self._bar.n
        # Never backwards: what a unit had read leaves its meter before the unit is seen to be finished.
        self._done = max(self._done, self._finished_bytes + sum(meter[0] for meter in self._meters))
        self._bar.update((self._done if self._total else documents) - before)
        counts = f"{documents:,} documents, {tokens / 1e6:.1f}M tokens"
        self._bar.set_postfix_str(f"{self._units_done}/{len(self._unit_bytes)} units, {counts}", refresh=False)
        if writes_line:
            self._last_line = now
            self._log(f"preparing: {self._state(now)}{counts}")

    def _state(self, now: float) -> str:
        rate = (self._done - self._start_bytes) / (now - self._started)
        if not self._total or rate <= 0:
            return ""
        share = self._done / self._total
        minutes = (self._total - self._done) / rate / 60
        return (
            f"{share:.0%}, {self._units_done}/{len(self._unit_bytes)} units, {rate / 1e6:.1f} MB/s, {minutes:.1f} "
            "minutes left; "
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
