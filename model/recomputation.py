"""Activation checkpointing: what is kept of a forward pass, and computed again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.checkpoint import checkpoint

from model import statistics
from model.sequence import SequenceContext

# "none" keeps every activation, "unit" keeps the inputs of the two residual branches of a block, "block" its input.
ACTIVATION_CHECKPOINTING = ("none", "unit", "block")


def unknown_mode(mode: str) -> str:
    """What to say of a mode that does not exist."""
    return f"activation_checkpointing: unknown mode {mode!r}; choose one of {', '.join(ACTIVATION_CHECKPOINTING)}"


def recomputed(sequence: SequenceContext, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function`, keeping its arguments alone for the backward pass, and what ranks exchange in it."""
    first, second = sequence.recomputation()
    # No layer draws random numbers, so there is no random state to restore.
    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (first, _second_run(second)),
    )


@contextlib.contextmanager
def _second_run(exchange: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with statistics.paused(), exchange:
        yield
