"""Answers in the shapes of OpenAI's interface: whole ones, and the chunks of streams."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from model.generation.batch import Token
from model.server.answer import Answer, Choice, Piece

# JSON has no infinity; OpenAI gives this for what is all but impossible.
LEAST_LOGPROB = -9999.0


class TextCompletion:
    """Of /v1/completions."""

    def __init__(self, model: str, spell: Callable[[int], str], echoes: dict[int, str]):
        """`spell`: the text of a token; `echoes`: what stands before the continuations, by their index."""
        self.id, self._created, self._model = f"cmpl-{uuid.uuid4().hex}", int(time.time()), model
        self._spell, self._echoes = spell, echoes
        self._offsets: dict[int, int] = {}

    def whole(self, answer: Answer) -> dict[str, Any]:
        choices = []
        for choice in answer.choices:
            piece = choice.read() or Piece()
            text = self._echoes.get(choice.index, "") + piece.text
            choices.append(self._choice(choice, text, piece.tokens, choice.finish_reason))
        return {**self._frame(), "choices": choices, "usage": answer.usage()}

    def opening(self, choice: Choice) -> Iterator[dict[str, Any]]:
        """The chunks with which a choice begins."""
        if echo := self._echoes.get(choice.index):
            yield {**self._frame(), "choices": [self._choice(choice, echo, [], None)]}

    def chunk(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return {**self._frame(), "choices": [self._choice(choice, piece.text, piece.tokens, None)]}

    def closing(self, choice: Choice) -> dict[str, Any]:
        return {**self._frame(), "choices": [self._choice(choice, "", [], choice.finish_reason)]}

    def usage(self, answer: Answer) -> dict[str, Any]:
        return {**self._frame(), "choices": [], "usage": answer.usage()}

    def _frame(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self._created, "model": self._model}

    def _choice(self, choice: Choice, text: str, tokens: list[Token], finish_reason: str | None) -> dict[str, Any]:
        logprobs = None
        if tokens:
            logprobs = self._logprobs(choice.index, tokens)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        texts = [self._spell(token.token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self._spell(token): _finite(logprob) for token, logprob in reversed(entry.top_logprobs)}
                for entry in tokens
            ],
            "text_offset": offsets,
        }


class ChatCompletion:
    """Of /v1/chat/completions."""

    def __init__(self, model: str, spell: Callable[[int], str]):
        """`spell`: the text of a token."""
        self.id, self._created, self._model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        self._spell = spell

    def whole(self, answer: Answer) -> dict[str, Any]:
        choices = []
        for choice in answer.choices:
            piece = choice.read() or Piece()
            message = {"role": "assistant", "content": piece.text, "refusal": None}
            choices.append(self._choice(choice, {"message": message}, piece.tokens, choice.finish_reason))
        return {**self._frame("chat.completion"), "choices": choices, "usage": answer.usage()}

    def opening(self, choice: Choice) -> Iterator[dict[str, Any]]:
        """The chunks with which a choice begins."""
        yield self._chunk(choice, {"role": "assistant", "content": ""}, [], None)

    def chunk(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return self._chunk(choice, {"content": piece.text}, piece.tokens, None)

    def closing(self, choice: Choice) -> dict[str, Any]:
        return self._chunk(choice, {}, [], choice.finish_reason)

    def usage(self, answer: Answer) -> dict[str, Any]:
        return {**self._frame("chat.completion.chunk"), "choices": [], "usage": answer.usage()}

    def _chunk(
        self, choice: Choice, delta: dict[str, str], tokens: list[Token], finish_reason: str | None
    ) -> dict[str, Any]:
        choices = [self._choice(choice, {"delta": delta}, tokens, finish_reason)]
        return {**self._frame("chat.completion.chunk"), "choices": choices}

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _choice(
        self, choice: Choice, content: dict[str, Any], tokens: list[Token], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if tokens:
            logprobs = {"content": [self._entry(token) for token in tokens], "refusal": None}
        return {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _entry(self, token: Token) -> dict[str, Any]:
        likeliest = [self._spelled(other, logprob) for other, logprob in token.top_logprobs]
        return {**self._spelled(token.token, token.logprob), "top_logprobs": likeliest}

    def _spelled(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._spell(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float | None) -> float:
    assert logprob is not None
    return max(logprob, LEAST_LOGPROB)
