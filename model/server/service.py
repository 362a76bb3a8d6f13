"""A model behind the interface: from the bytes of a request to its growing answer."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from model.generation.text import TextStream
from model.server.admission import DRAINING, Admission
from model.server.answer import Answer, CancelledError, Choice
from model.server.chat import ChatTemplate
from model.server.errors import ApiError
from model.server.limits import Limits
from model.server.metrics import Metrics
from model.server.request_fields import parse_json
from model.server.requests import CompletionRequest, read_chat, read_completion
from model.server.worker import BatchWorker

# Long prompts are read and cut into tokens beside the event loop.
READING_THREADS = 2


class ServedTokenizer(Protocol):
    """What the server needs of a tokenizer; data_pipeline.tokenizing.tokenizer.Tokenizer has it."""

    vocab_size: int
    eod_id: int
    control_tokens: dict[str, int]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class ServedModel:
    """What is served, as /v1/models tells of it."""

    name: str
    created: int
    parameters: int
    # Ids below it are both the model's and the tokenizer's.
    vocab_size: int


@dataclass(frozen=True)
class PreparedRequest:
    """A request whose prompts are tokens."""

    request: CompletionRequest
    prompts: tuple[tuple[int, ...], ...]
    # What an echo gives, for each prompt.
    texts: tuple[str, ...]


class Service:
    """Takes requests on and follows their sequences. All but `prepare` belongs to the event loop's thread."""

    def __init__(
        self,
        model: ServedModel,
        tokenizer: ServedTokenizer,
        chat: ChatTemplate,
        worker: BatchWorker,
        limits: Limits,
    ):
        self.model, self.limits, self.chat = model, limits, chat
        self._tokenizer, self._worker = tokenizer, worker
        self.admission = Admission(limits)
        self.metrics = Metrics(self._gauges)
        self._answers: set[Answer] = set()
        self._readers = ThreadPoolExecutor(READING_THREADS, thread_name_prefix="reader")
        self._control_spellings = {token: spelling for spelling, token in tokenizer.control_tokens.items()}
        self.spell = functools.lru_cache(maxsize=None)(self._spell)

    @property
    def has_failed(self) -> bool:
        return self._worker.failure is not None

    async def prepare(self, body: bytes, chat: bool) -> PreparedRequest:
        """What the body of a request asks for. Raises ApiError."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._prepare, body, chat)

    def _prepare(self, body: bytes, chat: bool) -> PreparedRequest:
        values = parse_json(body)
        read = read_chat if chat else read_completion
        request = read(values, self.model.name, self.limits, self.model.vocab_size)
        stop_tokens: tuple[int, ...] = (self._tokenizer.eod_id,)
        texts: list[str] = []
        if chat:
            prompts = [tuple(self.chat.encode(request.messages))]
            # One that is never drawn ends nothing.
            stop_tokens += tuple(token for token in self.chat.stop_tokens if 0 <= token < self.model.vocab_size)
            request = replace(request, stop=request.stop + self.chat.stop_strings)
        else:
            prompts = [self._tokens(prompt) for prompt in request.prompts]
            if request.echo:
                texts = [self._text(prompt) for prompt in request.prompts]
        for number, prompt in enumerate(prompts):
            self._check(prompt, "messages" if chat else "prompt" if len(prompts) == 1 else f"prompt[{number}]")
        settings = replace(request.settings, stop_tokens=tuple(dict.fromkeys(stop_tokens)))
        return PreparedRequest(replace(request, settings=settings), tuple(prompts), tuple(texts))

    def _tokens(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        # A text starts behind the end of another, as in training.
        return prompt if isinstance(prompt, tuple) else (self._tokenizer.eod_id, *self._tokenizer.encode(prompt))

    def _text(self, prompt: str | tuple[int, ...]) -> str:
        if isinstance(prompt, str):
            return prompt
        # Other ids are refused where the prompt is checked.
        return self._tokenizer.decode([token for token in prompt if 0 <= token < self.model.vocab_size])

    def _check(self, prompt: tuple[int, ...], key: str) -> None:
        if not prompt:
            raise ApiError(400, f"{key}: has no token", parameter=key)
        if len(prompt) > self.limits.max_prompt_tokens:
            raise ApiError(
                400,
                f"{key}: has {len(prompt)} tokens, more than the {self.limits.max_prompt_tokens} that are taken here",
                parameter=key,
                code="context_length_exceeded",
            )
        if not 0 <= min(prompt) <= max(prompt) < self.model.vocab_size:
            raise ApiError(400, f"{key}: token ids must be from 0 to {self.model.vocab_size - 1}", parameter=key)

    def begin(self, prepared: PreparedRequest) -> Answer:
        """Take a request on. Raises ApiError (429, 503)."""
        self.admission.refuse_when_draining()
        if self.has_failed:
            raise ApiError(503, "the model failed; the server ends")
        request, began = prepared.request, time.monotonic()
        self.admission.take_on(len(prepared.prompts) * request.n)
        choices: list[Choice] = []
        answer = Answer(choices, sum(map(len, prepared.prompts)))
        self._answers.add(answer)
        for prompt in prepared.prompts:
            for _ in range(request.n):
                index = len(choices)
                # Others for each continuation, and the same when the request comes again.
                settings = replace(request.settings, seed=_wrapped(request.settings.seed + index))
                text = TextStream(self._tokenizer.decode, prompt, request.stop)
                follow = functools.partial(self._follow, answer, began)
                choices.append(Choice(index, prompt, settings, text, follow))
        self.metrics.prompt_tokens.inc(answer.prompt_tokens)
        for choice in choices:
            self._worker.submit(choice)
        return answer

    def _follow(self, answer: Answer, began: float, choice: Choice, new_tokens: int) -> None:
        if choice.generated == new_tokens > 0:
            self.metrics.first_token.observe(time.monotonic() - began)
        self.metrics.generated_tokens.inc(new_tokens)
        if choice.has_ended and not choice.is_settled:
            was_left = isinstance(choice.error, CancelledError)
            self._settle(choice, began, choice.finish_reason or ("cancelled" if was_left else "error"))
        answer.wake()

    def _settle(self, choice: Choice, began: float, reason: str) -> None:
        """Count a sequence out, once, and take it from the batch where it may still be."""
        choice.is_settled = True
        if choice.in_batch:
            self._worker.cancel(choice)
        seconds = time.monotonic() - began
        self.admission.ended(seconds)
        self.metrics.sequences.labels(reason).inc()
        self.metrics.answer.observe(seconds)

    def end(self, answer: Answer, stalled: bool = False) -> None:
        """Nobody reads the answer any more: whole, or left by its client. A second time nothing happens."""
        if answer not in self._answers:
            return
        self._answers.discard(answer)
        if stalled:
            self.metrics.stalled.inc()
        for choice in answer.choices:
            choice.end(CancelledError())

    def break_off(self) -> int:
        """End every answer that is not whole with an error (503); returns how many there were."""
        broken = [answer for answer in self._answers if not answer.has_ended]
        for answer in broken:
            for choice in answer.choices:
                choice.end(ApiError(503, f"{DRAINING}; this answer is not whole"))
        return len(broken)

    def _spell(self, token: int) -> str:
        """The text of one token alone; of a control token, its name; of a part of a character, its id."""
        if token in self._control_spellings:
            return self._control_spellings[token]
        # Some tokenizers take a space from the first token of a text.
        before = self._tokenizer.encode("a")
        text = self._tokenizer.decode([*before, token])[len(self._tokenizer.decode(before)) :]
        return f"token_id:{token}" if not text or "\ufffd" in text else text

    def _gauges(self) -> dict[str, tuple[str, float]]:
        occupancy = self._worker.occupancy
        return {
            "requests_open": ("Requests that are being received, computed or sent.", self.admission.requests),
            "sequences_admitted": ("Sequences that clients wait for.", self.admission.sequences),
            "sequences_waiting": ("Sequences that wait for a slot.", occupancy.waiting),
            "sequences_running": ("Sequences in a slot.", occupancy.running),
            "slots": ("Sequences that can be continued at the same time.", self.limits.slots),
            "slots_free": ("Slots without a sequence.", occupancy.free_slots),
            "state_bytes_per_sequence": ("Memory of what a sequence has read.", self._worker.state_bytes),
            "draining": ("1 once no request is taken on any more.", float(self.admission.draining)),
        }

    def card(self) -> dict[str, Any]:
        """The model's entry of /v1/models."""
        trained = (
            "the template of the tokenizer's folder"
            if self.chat.name == "tokenizer"
            else "no chat training is known of this model: turns are written as plain text"
        )
        return {
            "id": self.model.name,
            "object": "model",
            "created": self.model.created,
            "owned_by": "xlstm-pretrain",
            "parameters": self.model.parameters,
            "state_bytes_per_sequence": self._worker.state_bytes,
            "max_prompt_tokens": self.limits.max_prompt_tokens,
            "max_new_tokens": self.limits.max_new_tokens,
            "chat_template": self.chat.name,
            "chat_note": trained,
        }

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)


def _wrapped(seed: int) -> int:
    """Seeds beyond 64 bits begin again at the lowest."""
    return (seed + 2**63) % 2**64 - 2**63
