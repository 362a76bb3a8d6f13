"""Tokens become text as they come, and texts that end a sequence are found in it.

What a token reads as may depend on those before it: a character may take several tokens, and a space may be left out
where a text begins. So tokens are decoded together with some before them, and a character is told when it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Tokens that are decoded again with each new one, so that it reads as it does in the whole text.
_BEFORE = 16
_MANY = 4 * _BEFORE
# What stands for bytes that are no character, or not yet: of one that is not whole at most three.
_REPLACEMENT = "\ufffd"
_UNFINISHED = 3


def stop_problems(stop: Sequence[str]) -> list[str]:
    """What is wrong with texts that are to end a sequence, one line each."""
    return ["stop must not be empty: every text holds it at once"] if "" in stop else []


class TextStream:
    """The text that a sequence is continued with, from its tokens, bit by bit.

    Attributes:
        stopped: one of the stop strings was found; no more text comes.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt_tokens: Sequence[int] = (), stop: Sequence[str] = ()
    ):
        """
        Args:
            decode: the tokenizer's, text of ids.
            prompt_tokens: what the sequence continues; none of its text is told, nor searched.
            stop: texts that end the sequence. They are no part of what is told.

        Raises:
            ValueError: an empty text among `stop`.
        """
        if problems := stop_problems(stop):
            raise ValueError("; ".join(problems))
        self.stopped = False
        self._decode = decode
        self._stop = tuple(stop)
        # The newest tokens, and how much of their text is known for certain.
        self._ids = list(prompt_tokens[-_BEFORE:])
        self._certain = decode(self._ids)
        # Known, and not told while it may be the beginning of a stop string.
        self._held = ""

    def add(self, token: int) -> str:
        """The text that this token makes known; often empty, or of several tokens."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        certain = text[: len(text) - _unfinished(text)]
        new = certain[len(self._certain) :]
        if len(certain) > len(self._certain):
            self._certain = certain
        if len(self._ids) >= _MANY and certain == text:
            self._ids = self._ids[-_BEFORE:]
            self._certain = self._decode(self._ids)
        return self._told(new)

    def finish(self) -> str:
        """The rest: the sequence has ended, and what is not a whole character now never will be."""
        if self.stopped:
            return ""
        rest = self._told(self._decode(self._ids)[len(self._certain) :])
        rest, self._held = rest + self._held, ""
        return rest

    def _told(self, new: str) -> str:
        text = self._held + new
        if found := [position for stop in self._stop if (position := text.find(stop)) >= 0]:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        kept = max((_beginning_at_end(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _unfinished(text: str) -> int:
    """Characters at the end of `text` that more tokens may make another one of."""
    return min(_UNFINISHED, len(text) - len(text.rstrip(_REPLACEMENT)))


def _beginning_at_end(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    return next((length for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])), 0)
