"""Our models as lm-eval-harness (lm-eval on the package index, MIT) asks models: by texts.

Axes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from data_pipeline.tokenizing.tokenizer import Tokenizer
from model.generation import generate
from train.evaluate.suites.answers import Answers
from train.evaluate.suites.base import Subject

_GENERATION_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


@dataclass(frozen=True)
class _Scored:
    """Tokens to be read, and those of them, the last ones, that are scored."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class _Continued:
    """A text to go on from, and lm-eval's settings of how."""

    text: str
    prompt: list[int]
    settings: dict[str, Any]


class HarnessModel(TemplateLM):  # type: ignore[misc, unused-ignore]
    """Answers lm-eval's three kinds of requests. Collective: all ranks are asked the same and get all answers.

    Texts become tokens as in training: without a token before them. The end-of-document token stands for no context.
    """

    def __init__(self, subject: Subject, answers: Answers, max_length: int, batch_size: int, seed: int = 0):
        """`max_length`: tokens that the model reads at most, older ones are left out. `seed`: of what is drawn."""
        super().__init__()
        self._subject = subject
        self._answers = answers
        self._tokens: Tokenizer = subject.tokenizer()
        self.max_length = max_length
        self._batch_size = batch_size
        self._seed = seed

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eod_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokens.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; nothing is added to them."""
        return [int(token) for token in self._tokens.encode(string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        questions = [_Scored(context, continuation) for _, context, continuation in requests]
        found = self._answers.ask(
            questions,
            key_of=lambda one: ["loglikelihood", one.context, one.continuation],
            size_of=lambda one: len(one.context) + len(one.continuation),
            answer=self._scores,
            batch_size=self._batch_size,
        )
        return [(float(score), bool(is_greedy)) for score, is_greedy in found]

    def _scores(self, questions: list[_Scored]) -> list[tuple[float, bool]]:
        rows = [(one.context + one.continuation)[-(self.max_length + 1) :] for one in questions]
        tokens = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
        for row, ids in enumerate(rows):
            # Padding lies behind: no token sees what comes after it.
            tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        logits = self._subject.logits(tokens)
        found = []
        for row, (ids, one) in enumerate(zip(rows, questions, strict=True)):
            targets = torch.tensor(one.continuation[-self.max_length :], device=logits.device)
            end = len(ids) - 1
            found.append(_score(logits[row, end - len(targets) : end], targets))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log likelihoods (nats) of whole texts: in windows, each token once, with as much before it as fits."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            of_text = [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += [(None, context, continuation) for context, continuation in of_text]
            counts.append(len(of_text))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each text, up to the first stop text; that and what follows are left out."""
        questions = []
        for request in requests:
            text, settings = request.args
            settings = _known(dict(normalize_gen_kwargs(settings)))
            room = self.max_length - settings["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"suite.max_length: {self.max_length} tokens have no room for the {settings['max_gen_toks']} that "
                    "a task lets a model write; raise it"
                )
            questions.append(_Continued(text, (self.tok_encode(text) or [self.eot_token_id])[-room:], settings))
        found: list[str | None] = [None] * len(questions)
        for settings in _distinct([one.settings for one in questions]):
            places = [place for place, one in enumerate(questions) if one.settings == settings]
            texts = self._answers.ask(
                [questions[place] for place in places],
                key_of=lambda one: ["generate_until", one.text, one.settings],
                size_of=lambda one: len(one.prompt),
                answer=self._texts,
                batch_size=self._batch_size,
            )
            for place, text in zip(places, texts, strict=True):
                found[place] = text
        return [text for text in found if text is not None]

    def _texts(self, questions: list[_Continued]) -> list[str]:
        """Of questions that have one way of writing."""
        settings = questions[0].settings
        writing = _Writing(self._tokens, settings["until"], len(questions))
        try:
            with self._subject.autocast():
                generate(
                    self._subject.model,
                    [one.prompt for one in questions],
                    max_new_tokens=settings["max_gen_toks"],
                    temperature=float(settings.get("temperature") or 0.0),
                    top_k=settings.get("top_k"),
                    top_p=settings.get("top_p", 1.0),
                    seed=self._seed,
                    stop_token=self.eot_token_id,
                    vocab_size=self._tokens.vocab_size,
                    on_token=writing.add,
                )
        except _AllWritten:
            pass
        return writing.texts()


class _AllWritten(Exception):
    """Every text has come to an end that the model does not know of."""


class _Writing:
    """Texts that are being written, token by token."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], count: int):
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._ids: list[list[int]] = [[] for _ in range(count)]
        self._ended = [False] * count

    def add(self, tokens: Tensor, active: Tensor) -> None:
        for row, (token, is_active) in enumerate(zip(tokens.tolist(), active.tolist(), strict=True)):
            if not self._ended[row]:
                self._ids[row] += [token] if is_active else []
                self._ended[row] = not is_active or self._has_stop(row)
        if all(self._ended):
            raise _AllWritten

    def _has_stop(self, row: int) -> bool:
        text = self._tokenizer.decode(self._ids[row])
        return any(stop in text for stop in self._stops)

    def texts(self) -> list[str]:
        found = []
        for ids in self._ids:
            text = self._tokenizer.decode(ids)
            for stop in self._stops:
                text = text.split(stop)[0]
            found.append(text)
        return found


def _score(logits: Tensor, targets: Tensor) -> tuple[float, bool]:
    """(sum of the log probabilities of targets [S] in nats, whether each is the likeliest) by logits [S, V]."""
    scores = torch.log_softmax(logits.float(), dim=-1)
    of_targets = scores.gather(-1, targets[:, None]).double().sum()
    return float(of_targets), bool((scores.argmax(-1) == targets).all())


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings. Raises ValueError where there are some that would be ignored."""
    if unknown := sorted(settings.keys() - _GENERATION_SETTINGS):
        raise ValueError(
            f"suite.tasks: a task asks to generate with {', '.join(unknown)}, which is not known here; leave the task "
            f"out, or give a copy of it with none but {', '.join(sorted(_GENERATION_SETTINGS))}"
        )
    return settings


def _distinct(values: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
