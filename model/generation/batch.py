"""Continuous batching: sequences join a running batch when they come, and leave it when they end.

A sequence's state has a fixed size whatever it has read, so a slot of the batch is a row of the session's buffers, and
joining it is a copy. Prompts are read in pieces between decoding steps, so that those who are being continued wait for
one piece at most. What a sequence is continued with depends on its own prompt, settings and seed: its prompt is read by
itself in pieces of one size, its row is computed beside the others, and its draws are its own.

The batch is dense: the sequences that run have the first rows. Where one leaves, the last takes its row.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from model.generation.host_copy import HostCopy
from model.generation.prefill import Prefix, read_piece
from model.generation.prefix_cache import PrefixCache
from model.generation.sampling import Sampler, SamplingSettings
from model.generation.session import Session
from model.language_model import LanguageModel
from model.state import ModelState

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """A token that a sequence was continued with.

    Attributes:
        request: the handle that `ContinuousBatch.add` gave.
        token: its id.
        logprob: natural logarithm of its probability, where the request asked for any; else None.
        top_logprobs: the most likely tokens with theirs, best first, as many as were asked for.
        finish_reason: None while the sequence goes on; "stop": this is one of its stop tokens; "length": it has
            `max_new_tokens`.
    """

    request: int
    token: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None


@dataclass(eq=False)
class _Request:
    handle: int
    # What is to be read behind `behind`.
    prompt: tuple[int, ...]
    settings: SamplingSettings
    behind: Prefix | None
    # Of the prompt: the state behind the first `n_read` tokens.
    state: ModelState | None = None
    n_read: int = 0
    begun: bool = False
    n_new: int = 0
    ended: bool = False
    # The tokens before the prompt count too.
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = len(self.prompt) + (0 if self.behind is None else len(self.behind.tokens))


class ContinuousBatch:
    """Continues any number of sequences, up to `slots` of them at a time. One thread uses it."""

    def __init__(
        self,
        model: LanguageModel,
        slots: int,
        *,
        prefill_tokens: int,
        prefix_cache_bytes: int = 0,
        vocab_size: int | None = None,
        batch_sizes: Sequence[int] | None = None,
    ):
        """
        Args:
            model: on any device and in any dtype; nothing changes or moves it meanwhile.
            slots: sequences that run at once; the memory of their states is taken now.
            prefill_tokens: prompt tokens that are read between two decoding steps at most; prompts are cut at its
                multiples, and prefixes are cached there.
            prefix_cache_bytes: of states of prefixes that are kept for prompts that begin alike; 0: none.
            vocab_size: draw only ids below this, where the model has more rows than its tokenizer ids.
            batch_sizes: as for Session.

        Raises:
            ValueError: a number that makes no sense, all of them at once.
        """
        n_ids = model.config.vocab_size
        problems = [f"slots must be at least 1, not {slots}"] if slots < 1 else []
        if prefill_tokens < 1:
            problems.append(f"prefill_tokens must be at least 1, not {prefill_tokens}")
        if prefix_cache_bytes < 0:
            problems.append(f"prefix_cache_bytes must be at least 0, not {prefix_cache_bytes}")
        if vocab_size is not None and not 1 <= vocab_size <= n_ids:
            problems.append(f"vocab_size must be from 1 to the model's {n_ids}, not {vocab_size}")
        if batch_sizes is not None and (min(batch_sizes, default=0) < 1 or max(batch_sizes) != slots):
            problems.append(f"batch_sizes must be positive and end with slots {slots}, not {list(batch_sizes)}")
        if problems:
            raise ValueError("; ".join(problems))
        self._model = model
        self._n_ids = n_ids
        self._allowed = vocab_size or n_ids
        self._prefill_tokens = prefill_tokens
        self._session = Session(model, slots, batch_sizes=batch_sizes)
        self._sampler = Sampler(slots, self._allowed, self._session.device)
        self._cache = PrefixCache(prefix_cache_bytes)
        # Requests whose prompt is not all read, in order of arrival; the first one is being read.
        self._waiting: deque[_Request] = deque()
        # Those whose row is their place in this list.
        self._running: list[_Request] = []
        self._open: dict[int, _Request] = {}
        self._handles = itertools.count()

    @property
    def waiting(self) -> int:
        """Requests whose prompt is not all read yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being continued."""
        return len(self._running)

    @property
    def free_slots(self) -> int:
        return self._session.rows - len(self._running)

    @property
    def state_bytes_per_slot(self) -> int:
        """Bytes of one sequence's state; with attention, with the room that its caches have now."""
        return self._session.state_bytes

    @property
    def prefix_cache(self) -> PrefixCache:
        """The states of prefixes that are kept, and how often they were of use."""
        return self._cache

    def add(self, prompt_tokens: Sequence[int], settings: SamplingSettings, *, behind: Prefix | None = None) -> int:
        """Let a sequence join as soon as those before it have and a slot is free; returns its handle.

        Args:
            prompt_tokens: ids of the model's vocabulary; none is enough where `behind` has some.
            settings: how it is continued.
            behind: what the model has read before the prompt.

        Raises:
            ValueError: the prompt or a setting makes no sense, all problems at once.
        """
        prompt = tuple(int(token) for token in prompt_tokens)
        problems = settings.problems(self._allowed)
        if not prompt and behind is None:
            problems.append("the prompt is empty; give it at least one token (the end-of-document token starts a text)")
        if prompt and not 0 <= min(prompt) <= max(prompt) < self._n_ids:
            problems.append(
                f"the prompt holds ids {min(prompt)} to {max(prompt)}, the model has 0 to {self._n_ids - 1}: it was "
                "encoded with another tokenizer"
            )
        if problems:
            raise ValueError("; ".join(problems))
        request = _Request(next(self._handles), prompt, settings, behind)
        self._open[request.handle] = request
        self._waiting.append(request)
        return request.handle

    def cancel(self, request: int) -> None:
        """End a request: nothing more comes of it, and its slot is free. Of one that is unknown or ended: nothing."""
        found = self._open.pop(request, None)
        if found is None:
            return
        if found in self._running:
            self._leave(found)
        else:
            self._waiting.remove(found)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Read a piece of a prompt, or several short ones, and continue each sequence that runs by one token.

        Returns:
            One token of each sequence that ran, and none when there is nothing to do or a long prompt is being read.
        """
        self._read_prompts()
        if not self._running:
            return []
        drew = list(self._running)
        drawn = self._sampler.draw(self._session.logits[: len(drew)])
        self._session.tokens[: len(drew)].copy_(drawn.tokens)
        copy = HostCopy(drawn)
        for request in drew:
            request.n_new += 1
            # What ends by its length is known before its last token is.
            if request.n_new == request.settings.max_new_tokens:
                self._end(request)
        if self._session.runs_ahead:
            self._advance()
            return self._tell(drew, copy)
        tokens = self._tell(drew, copy)
        self._advance()
        return tokens

    def _read_prompts(self) -> None:
        """Whole pieces, as many as `prefill_tokens` allow; a request that is read to its end joins."""
        left = self._prefill_tokens
        while self._waiting and self.free_slots:
            request = self._waiting[0]
            if not request.begun:
                self._begin(request)
            logits = None if request.behind is None else request.behind.logits
            if request.n_read < len(request.prompt):
                end = min(len(request.prompt), request.n_read + self._prefill_tokens)
                if end - request.n_read > left:
                    return
                left -= end - request.n_read
                logits, request.state = read_piece(self._model, request.prompt[request.n_read : end], request.state)
                request.n_read = end
                if request.behind is None and end % self._prefill_tokens == 0:
                    self._cache.put(request.prompt[:end], request.state)
            if request.n_read == len(request.prompt):
                assert logits is not None
                self._join(self._waiting.popleft(), logits)

    def _begin(self, request: _Request) -> None:
        """Find what has been read of the prompt already, all but its last token at most."""
        request.begun = True
        if request.behind is not None:
            request.state = request.behind.state
            return
        boundaries = range(self._prefill_tokens, len(request.prompt), self._prefill_tokens)
        request.n_read, request.state = self._cache.longest(request.prompt, boundaries)

    def _join(self, request: _Request, logits: Tensor) -> None:
        assert request.state is not None
        row = len(self._running)
        self._running.append(request)
        self._fit()
        self._session.put(row, request.state, logits)
        held = () if request.behind is None else request.behind.tokens
        self._sampler.begin(row, request.settings, (*held, *request.prompt))
        request.state = request.behind = None

    def _advance(self) -> None:
        if self._running:
            self._fit()
            self._session.step(len(self._running))

    def _fit(self) -> None:
        self._session.fit(max(request.length + request.n_new for request in self._running))

    def _tell(self, drew: list[_Request], copy: HostCopy) -> list[Token]:
        """The tokens of the requests that drew, in their rows then; those that stop with them leave."""
        told = []
        for row, (request, token) in enumerate(zip(drew, copy.tokens().tolist(), strict=True)):
            settings = request.settings
            logprob, top = (None, ()) if settings.logprobs is None else copy.logprobs(row, settings.logprobs)
            reason: FinishReason | None = None
            if token in settings.stop_tokens:
                reason = "stop"
            elif request.n_new == settings.max_new_tokens:
                reason = "length"
            if reason is not None:
                self._end(request)
            told.append(Token(request.handle, token, logprob, top, reason))
        return told

    def _end(self, request: _Request) -> None:
        if not request.ended:
            request.ended = True
            self._open.pop(request.handle)
            self._leave(request)

    def _leave(self, request: _Request) -> None:
        """Free the row; the batch stays dense."""
        row, last = self._running.index(request), len(self._running) - 1
        if row != last:
            self._session.move(last, row)
            self._sampler.move(last, row)
            self._running[row] = self._running[last]
        self._running.pop()
