"""What a preparation tells a person while it runs: share done, MB/s, time left, documents and tokens so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

# Seconds between two lines where no bar can be drawn.
PLAIN_INTERVAL = 15.0


class Progress:
    """A bar on a terminal, a line now and then elsewhere. Sizes in bytes on disk; 0 in all: documents are counted."""

    def __init__(self, total_bytes: int, done_bytes: int, log: Callable[[str], None], shown: bool):
        self._total = total_bytes
        self._done = done_bytes
        self._start_bytes = done_bytes
        self._documents = 0
        self._tokens = 0
        self._log = log
        self._started = self._last_line = time.monotonic()
        self._plain = shown and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total_bytes or None,
            initial=done_bytes,
            unit="B" if total_bytes else "document",
            unit_scale=True,
            desc="preparing",
            disable=not shown or self._plain,
            dynamic_ncols=True,
        )

    def add_bytes(self, count: int) -> None:
        """Some bytes of the input have been read."""
        self._done += count
        if self._total:
            self._bar.update(count)

    def add_document(self, tokens: int) -> None:
        """A document has become tokens."""
        self._documents += 1
        self._tokens += tokens
        if not self._total:
            self._bar.update(1)
        if self._documents % 64 == 0:
            self._bar.set_postfix_str(f"{self._documents:,} documents, {self._tokens / 1e6:.1f}M tokens", refresh=False)
            if self._plain and time.monotonic() - self._last_line > PLAIN_INTERVAL:
                self._write_line()

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        rate = (self._done - self._start_bytes) / (self._last_line - self._started)
        counts = f"{self._documents:,} documents, {self._tokens / 1e6:.1f}M tokens"
        if not self._total or rate <= 0:
            self._log(f"preparing: {counts}")
            return
        left = (self._total - self._done) / rate
        share = self._done / self._total
        self._log(f"preparing: {share:.0%}, {rate / 1e6:.1f} MB/s, {left / 60:.1f} minutes left; {counts}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
