"""Choosing the next token from logits, on their device: no draw waits for the host.

A sequence draws its own random numbers, each a function of its seed and of how many tokens it has drawn before. So it
is continued alike whatever else is in the batch, whenever it joined, and in whichever row it is.

Axes: R rows of a sampler, B rows that draw, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_INT64 = 2**63


@dataclass(frozen=True)
class SamplingSettings:
    """How one sequence is continued.

    Attributes:
        max_new_tokens: the sequence ends behind so many.
        temperature: the logits are divided by it; 0 takes the most likely token.
        top_k: draw from the k most likely tokens; None: from all.
        top_p: draw from the most likely tokens that together have at least this probability (arXiv 1904.09751).
        min_p: draw from tokens at least so probable, as a share of the most likely one's probability
            (arXiv 2407.01082).
        repetition_penalty: logits of tokens that the sequence or its prompt holds are divided by it where they are
            positive, else multiplied (arXiv 1909.05858, section 4.1); 1: no change.
        seed: of the random numbers.
        stop_tokens: each ends the sequence, as its last token.
        logprobs: as many of the most likely tokens to tell with each token, with the natural logarithms of the
            probabilities that the model itself gives, before all of the above; None: none, not even the token's own.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None

    def problems(self, vocab_size: int | None = None) -> list[str]:
        """What is wrong, one line for each setting, which begins with its name.

        `vocab_size`: of the model that is to draw; None: not known yet.
        """
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature must be 0 (most likely token) or positive, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k must be at least 1 or null, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p must be from 0 to 1, not {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            problems.append(f"repetition_penalty must be positive (1: none), not {self.repetition_penalty}")
        if self.logprobs is not None and self.logprobs < 0:
            problems.append(f"logprobs must be at least 0 or null, not {self.logprobs}")
        if vocab_size is None:
            return problems
        if strange := [token for token in self.stop_tokens if not 0 <= token < vocab_size]:
            problems.append(f"stop_tokens {strange} are not among the model's ids 0 to {vocab_size - 1}")
        if self.logprobs is not None and self.logprobs > vocab_size:
            problems.append(f"logprobs must be at most the {vocab_size} ids that there are, not {self.logprobs}")
        return problems


@dataclass(frozen=True)
class Drawn:
    """One token for each row that drew, on the device of the logits.

    Attributes:
        tokens: [B] int64.
        logprobs: [B] float32, of these tokens; None where no row asked.
        top_tokens, top_logprobs: [B, K] int64 and float32, the most likely ones, best first; K is the most that any of
            the rows asked for.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None


class _Rows(NamedTuple):
    """Of every row of a sampler, or of the first: [R] each, `seen` [R, V]."""

    is_greedy: Tensor
    # 1 where the row is greedy.
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor
    # Its random numbers, and how many of them it has drawn.
    stream: Tensor
    position: Tensor
    # Tokens that the prompt or the sequence holds; kept where the row has a penalty.
    seen: Tensor


class Sampler:
    """Draws for sequences that come and go, each in a row of its own with its own settings."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device):
        """`rows`: R. `vocab_size`: ids below it can be drawn."""
        self._vocab_size = vocab_size
        self._settings: list[SamplingSettings | None] = [None] * rows
        # What decides of each row, on the device: one draw is for all of them.
        self._rows = _Rows(
            is_greedy=torch.ones(rows, dtype=torch.bool, device=device),
            temperature=torch.ones(rows, dtype=torch.float64, device=device),
            top_k=torch.full((rows,), vocab_size, dtype=torch.int64, device=device),
            top_p=torch.ones(rows, dtype=torch.float64, device=device),
            min_p=torch.zeros(rows, dtype=torch.float64, device=device),
            penalty=torch.ones(rows, dtype=torch.float32, device=device),
            stream=torch.zeros(rows, dtype=torch.int64, device=device),
            position=torch.zeros(rows, dtype=torch.int64, device=device),
            seen=torch.zeros(rows, vocab_size, dtype=torch.bool, device=device),
        )
        self._first_rows: dict[int, _Rows] = {}

    @torch.inference_mode()
    def begin(self, row: int, settings: SamplingSettings, prompt: Sequence[int] | Tensor) -> None:
        """Give `row` to a sequence that continues the ids of `prompt`."""
        rows = self._rows
        self._settings[row] = settings
        rows.is_greedy[row] = settings.temperature == 0
        rows.temperature[row] = settings.temperature or 1.0
        rows.top_k[row] = min(settings.top_k or self._vocab_size, self._vocab_size)
        rows.top_p[row] = settings.top_p
        rows.min_p[row] = settings.min_p
        rows.penalty[row] = settings.repetition_penalty
        rows.stream[row] = stream_of(settings.seed)
        rows.position[row] = 0
        rows.seen[row] = False
        if settings.repetition_penalty != 1:
            ids = torch.as_tensor(prompt, dtype=torch.int64)
            # Ids that cannot be drawn need no penalty.
            rows.seen[row, ids[ids < self._vocab_size].to(rows.seen.device)] = True

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Let the sequence in row `source` go on in row `target`."""
        self._settings[target] = self._settings[source]
        for values in self._rows:
            values[target] = values[source]

    @torch.inference_mode()
    def draw(self, logits: Tensor) -> Drawn:
        """The next token of each of the first B rows from logits [B, V or more], float32 or float64."""
        count = logits.shape[0]
        settings = [kept for kept in self._settings[:count] if kept is not None]
        if count not in self._first_rows:
            self._first_rows[count] = _Rows(*(values[:count] for values in self._rows))
        rows = self._first_rows[count]
        scores = logits = logits[:, : self._vocab_size]
        # What no row asks for is left out: on a CPU each operation takes as long as a large one.
        penalises = any(kept.repetition_penalty != 1 for kept in settings)
        n_greedy = sum(kept.temperature == 0 for kept in settings)
        if penalises:
            scores = penalised(logits, rows.seen, rows.penalty)
        if n_greedy == len(settings):
            tokens = scores.argmax(dim=-1)
        else:
            limits = Limits(rows.temperature, rows.top_k, rows.top_p, rows.min_p)
            tokens = choose(scores, uniform(rows.stream, rows.position), limits)
            if n_greedy:
                tokens = torch.where(rows.is_greedy, scores.argmax(dim=-1), tokens)
        rows.position.add_(1)
        if penalises:
            rows.seen.scatter_(1, tokens[:, None], True)
        return _with_logprobs(tokens, logits, [kept.logprobs for kept in settings if kept.logprobs is not None])


def penalised(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Logits [B, V] with those of `seen` [B, V] made less likely by `penalty` [B]."""
    less_likely = torch.where(logits > 0, logits / penalty[:, None], logits * penalty[:, None])
    return torch.where(seen, less_likely, logits)


class Limits(NamedTuple):
    """Of each row, all [B] float64 but for top_k, which is int64."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


def choose(scores: Tensor, draws: Tensor, limits: Limits) -> Tensor:
    """One token [B] from scores [B, V], where draws [B] in [0, 1) picks among the candidates by their probability.

    The probabilities are computed in float64.
    """
    temperature, top_k, top_p, min_p = (values[:, None] for values in limits)
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    is_among_k = torch.arange(scores.shape[1], device=scores.device) < top_k
    ordered = (ordered.double() / temperature).masked_fill(~is_among_k, -torch.inf)
    probabilities = torch.softmax(ordered, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # A token is a candidate when those before it do not have top_p yet; the first always is.
    candidate = is_among_k & (cumulative - probabilities < top_p) & (probabilities >= min_p * probabilities[:, :1])
    candidate[:, 0] = True
    total = (probabilities * candidate).sum(dim=-1, keepdim=True)
    chosen = (cumulative < draws[:, None] * total).sum(dim=-1, keepdim=True)
    chosen = torch.minimum(chosen, candidate.sum(dim=-1, keepdim=True) - 1)
    return ids.gather(1, chosen).squeeze(1)


def stream_of(seed: int) -> int:
    """Where SplitMix64 begins for a seed: near seeds begin far from each other."""
    return int(_scrambled(torch.tensor(_signed(seed % (2 * _INT64)))))


def uniform(stream: Tensor, position: Tensor) -> Tensor:
    """Random numbers in [0, 1), [B] float64, each a function of `stream_of` a seed and of a position, both [B] int64.

    Number `position` of the sequence that SplitMix64 begins there (Steele, Lea and Flood, OOPSLA 2014, figure 15): its
    increment is odd, so that no position has the number of another.
    """
    state = stream + (position + 1) * _signed(0x9E3779B97F4A7C15)
    return _shifted(_scrambled(state), 11).double() * 2.0**-53


def _scrambled(x: Tensor) -> Tensor:
    """SplitMix64's function of 64 bits, whose values are as good as random ones; products wrap around."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Without the sign that >> draws in."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(x: int) -> int:
    return x - 2 * _INT64 if x >= _INT64 else x


def _with_logprobs(tokens: Tensor, logits: Tensor, wanted: list[int]) -> Drawn:
    if not wanted:
        return Drawn(tokens)
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    top = logprobs.topk(max(wanted), dim=-1)
    return Drawn(tokens, logprobs.gather(1, tokens[:, None]).squeeze(1), top.indices, top.values)
