"""What ends a run."""

from __future__ import annotations


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""
