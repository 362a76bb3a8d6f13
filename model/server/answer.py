"""The continuations that one request asked for, as they grow.

Everything here runs in the thread of the event loop. Text is made, and stop strings are found, as tokens come: so a
reader who is slow costs the bytes of an answer and no slot.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.generation.batch import Token
from model.generation.sampling import SamplingSettings
from model.generation.text import TextStream
from model.server.errors import ApiError


class CancelledError(Exception):
    """Of a continuation that its client left."""


log = logging.getLogger(__name__)


@dataclass
class Piece:
    """What a choice gained since it was last read."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)


class Choice:
    """One continuation: a job of the batch worker."""

    def __init__(
        self,
        index: int,
        prompt_tokens: Sequence[int],
        settings: SamplingSettings,
        text: TextStream,
        on_change: Callable[[Choice, int], None],
    ):
        """`on_change` is called, with the number of new tokens, when there is more to read or it has ended."""
        self.index, self.prompt_tokens, self.settings = index, prompt_tokens, settings
        # OpenAI's word for why it ended; None: it goes on.
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.generated = 0
        # Whether the batch may still have it.
        self.in_batch = True
        # Whether its end has been counted; of the one who counts.
        self.is_settled = False
        self._text, self._on_change = text, on_change
        self._unread = Piece()

    @property
    def has_ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def take(self, tokens: Sequence[Token]) -> None:
        before = self.generated
        try:
            for token in tokens:
                # What the batch made before it heard of the end.
                if not self.has_ended:
                    self._add(token)
        except Exception as error:
            # The others of the batch get their tokens all the same.
            log.exception("the text of a sequence cannot be made")
            self.error = error
        self._on_change(self, self.generated - before)

    def _add(self, token: Token) -> None:
        self.generated += 1
        ends = token.finish_reason == "stop"
        # The token that ends a text has none itself.
        if not ends:
            self._unread.text += self._text.add(token.token)
        if self.settings.logprobs is not None and not ends:
            self._unread.tokens.append(token)
        if token.finish_reason is not None:
            self.in_batch = False
        if self._text.stopped:
            self.finish_reason = "stop"
        elif token.finish_reason is not None:
            self._unread.text += self._text.finish()
            self.finish_reason = "stop" if self._text.stopped else token.finish_reason

    def fail(self, error: Exception) -> None:
        self.in_batch = False
        self.end(error)

    def end(self, error: Exception) -> None:
        """Nothing more will come, because of `error`; one that has ended stays as it is."""
        if not self.has_ended:
            self.error = error
            self._on_change(self, 0)

    def read(self) -> Piece | None:
        """What is new, and then is no more; None: nothing."""
        if not self._unread.text and not self._unread.tokens:
            return None
        piece, self._unread = self._unread, Piece()
        return piece


class Answer:
    """All continuations of one request, and the one that waits for them."""

    def __init__(self, choices: Sequence[Choice], prompt_tokens: int):
        """`prompt_tokens`: of all prompts; one is counted once however often it is continued."""
        self.choices, self.prompt_tokens = choices, prompt_tokens
        self._changed = asyncio.Event()

    def wake(self) -> None:
        self._changed.set()

    async def changed(self, seconds: float | None = None) -> bool:
        """Wait until there is something new since the last call; False: `seconds` went by without."""
        try:
            # Not wait_for, which loses a cancellation that comes with the event (Python issue 86296).
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True

    @property
    def has_ended(self) -> bool:
        return all(choice.has_ended for choice in self.choices)

    @property
    def error(self) -> ApiError | None:
        """Why it will not be whole."""
        for choice in self.choices:
            if isinstance(choice.error, ApiError):
                return choice.error
            if choice.error is not None:
                return ApiError(500, f"the model failed: {type(choice.error).__name__}")
        return None

    def usage(self) -> dict[str, Any]:
        completion = sum(choice.generated for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }
