"""Standard output and error that outlive their reader: a command whose work is files goes on without a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

# (name of the stream, why it is lost)
Report = Callable[[str, str], None]


class LastingOutput:
    """`sys.stdout` and `sys.stderr` of this process, which nobody may read any more: a closed pipe, a terminal that is
    gone, a full disk. What is written then goes to a file, or nowhere as long as there is none.

    The descriptors themselves are redirected, so that libraries and child processes that write to them live on too.
    """

    def __init__(self) -> None:
        self._file = Path(os.devnull)
        self._report: Report | None = None
        self._losses: list[tuple[str, str]] = []
        self._streams: list[_LastingStream] = []

    @contextmanager
    def installed(self) -> Iterator[LastingOutput]:
        """Take the place of both streams for a while."""
        before = sys.stdout, sys.stderr
        missing = _open_missing_descriptors()
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(descriptor, "w", errors="backslashreplace", closefd=False))
            stream = _LastingStream(getattr(sys, name), name, self)
            self._streams.append(stream)
            setattr(sys, name, cast("TextIO", stream))
            if descriptor in missing:
                self.lose(stream, "closed at the start")
        try:
            yield self
        finally:
            sys.stdout, sys.stderr = before
            self._streams.clear()

    @contextmanager
    def spilling_to(self, file: Path, report: Report) -> Iterator[None]:
        """From now on what is lost goes to `file`; each loss, also an earlier one, is told to `report` once."""
        self._file, self._report = file, report
        for name, reason in self._losses:
            report(name, reason)
        for stream in self._streams:
            if stream.is_lost:
                stream.redirect(file)
        try:
            yield
        finally:
            self._file, self._report = Path(os.devnull), None

    def lose_terminal(self, reason: str) -> None:
        """Give up each stream that is a terminal."""
        for stream in self._streams:
            if stream.isatty():
                self.lose(stream, reason)

    def lose(self, stream: _LastingStream, reason: str) -> None:
        """Give up one stream."""
        if stream.is_lost:
            return
        stream.is_lost = True
        stream.redirect(self._file)
        self._losses.append((stream.name, reason))
        if self._report is not None:
            self._report(stream.name, reason)


class _LastingStream(io.TextIOBase):
    def __init__(self, stream: TextIO, name: str, output: LastingOutput):
        self._stream = stream
        self._output = output
        self.name = name
        self.is_lost = False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except BlockingIOError:
            # A reader that is slow, not gone: these lines are dropped.
            return
        except OSError as error:
            self._output.lose(self, error.strerror or type(error).__name__)
        except ValueError:
            if not self._stream.closed:
                raise
            self._output.lose(self, "closed")

    def redirect(self, file: Path) -> None:
        """Let everything go to `file` from now on, also what the stream still holds."""
        # The disk may be what is wrong.
        with contextlib.suppress(OSError):
            target = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.dup2(target, self._stream.fileno())
            except (io.UnsupportedOperation, ValueError):
                # No stream of the operating system: a notebook's, a test's.
                self._stream = os.fdopen(os.dup(target), "w", errors="backslashreplace")
            finally:
                os.close(target)
            self._stream.flush()

    def isatty(self) -> bool:
        return not self.is_lost and not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_missing_descriptors() -> list[int]:
    """Open those of 0 to 2 that the process was started without (`2>&-`): the next file that is opened would get the
    number, and whatever a library complains about. Returns them."""
    missing = []
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            missing.append(descriptor)
            os.open(os.devnull, os.O_RDWR)
    return missing


_CURRENT: list[LastingOutput] = []


@contextmanager
def lasting_output() -> Iterator[LastingOutput]:
    """The process's `LastingOutput`, installed unless it already is."""
    if _CURRENT:
        yield _CURRENT[0]
        return
    output = LastingOutput()
    _CURRENT.append(output)
    try:
        with output.installed():
            yield output
    finally:
        _CURRENT.clear()
