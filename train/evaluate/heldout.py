"""Held-out loss on named sets: every token of a set counts once, whatever the number of ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

import torch

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.reading.batch import Batch, Columns
from data_pipeline.reading.stream import WindowStream
from train.config import EvaluationSetConfig, RunConfig
from train.data import RunCorpus, open_corpus
from train.parallel.mesh import Mesh
from train.watch.whereabouts import EVALUATE


class Scorer(Protocol):
    """What scores batches: an engine, or a model that is not trained."""

    @property
    def mesh(self) -> Mesh: ...

    def evaluate_batch(self, batch: Batch) -> tuple[float, int]:
        """(sum of the losses in nats, scored targets) of a batch. Collective."""


@dataclass(frozen=True)
class EvaluationResult:
    """Mean loss in nats per token, its exponential, and the number of tokens scored."""

    loss: float
    perplexity: float
    tokens: int


def open_evaluation_corpora(config: RunConfig, corpus: RunCorpus, check: str = "size") -> dict[str, Corpus]:
    """The corpus of every evaluation set by set name. Raises ValueError when one cannot be read by the run's model."""
    corpora = {}
    for name, evaluation_set in config.evaluation.sets.items():
        if evaluation_set.directory is None:
            assert isinstance(corpus, Corpus), "validate() wants a directory where nothing is prepared"
            corpora[name] = corpus
        else:
            corpora[name] = open_corpus(config, evaluation_set.directory, check)
        if corpora[name].tokenizer().fingerprint != corpus.tokenizer().fingerprint:
            raise ValueError(
                f"evaluation.sets.{name}.directory: {evaluation_set.directory} was prepared with another tokenizer "
                f"than corpus.directory ({config.corpus.directory}); prepare it elsewhere with the run's tokenizer"
            )
    return corpora


@dataclass(frozen=True)
class EvaluationWindows:
    """Windows of consecutive text, in order, up to the limit of tokens.

    `scale`: tokens of the split for which each scored one stands in the loss of the whole set. Above 1 for a source of
    a set with `by_source` that `max_tokens` cuts: every source then counts in the set as much as it has in the split.
    """

    stream: WindowStream
    count: int
    scale: float = 1.0

    def batch(self, first: int, size: int, columns: Columns | None = None) -> Batch:
        """Windows first ... first + size - 1, fewer at the end, or these columns of them."""
        return self.stream.batch(first, min(size, self.count - first), columns)

    @property
    def targets(self) -> int:
        """Tokens that are scored."""
        return self.stream.targets_before(self.count)

    @property
    def fingerprint(self) -> str:
        """Identity of the scored tokens (hex sha256): losses under equal ones can be compared."""
        return hashlib.sha256(f"{self.stream.fingerprint} {self.count}".encode()).hexdigest()


def open_windows(
    corpus: Corpus, settings: EvaluationSetConfig, sequence_length: int, source: str | None = None
) -> EvaluationWindows:
    """The windows of a set; `source`: of this one of its sources only."""
    stream = WindowStream(corpus, settings.split, sequence_length, source or settings.source)
    limit = stream.windows if settings.max_tokens is None else -(-settings.max_tokens // sequence_length)
    return EvaluationWindows(stream, min(limit, stream.windows))


def parts_of_set(corpus: Corpus, settings: EvaluationSetConfig, sequence_length: int) -> dict[str, EvaluationWindows]:
    """What evaluation scores of one set, exactly: its sources by label, or all of it under "".

    Also used to score the n-gram baselines on the same tokens. A source without a token to predict is left out.
    """
    sources = [s for s in corpus.sources(settings.split) if corpus.tokens(settings.split, s) > 1]
    if not settings.by_source or len(sources) < 2:
        return {"": open_windows(corpus, settings, sequence_length)}
    parts = {source: open_windows(corpus, settings, sequence_length, source) for source in sources}
    return {
        source: dataclasses.replace(windows, scale=windows.stream.targets / windows.targets)
        for source, windows in parts.items()
    }


def open_sets(config: RunConfig, corpora: dict[str, Corpus]) -> dict[str, EvaluationWindows]:
    """All that a run scores, by the name under which it is reported: <set>, or <set>/<source> of each source."""
    return {
        f"{name}/{source}" if source else name: windows
        for name, settings in config.evaluation.sets.items()
        for source, windows in parts_of_set(corpora[name], settings, config.training.sequence_length).items()
    }


def evaluate(scorer: Scorer, config: RunConfig, corpora: dict[str, Corpus]) -> dict[str, EvaluationResult]:
    """Score every evaluation set of `config`, and each source of those with `by_source` as <set>/<source>.

    A set's loss is the mean over its tokens, also where `max_tokens` bounds what is scored of each source: the means of
    the sources are then weighted by the tokens that each has in the split.
    Collective: all ranks call it and get equal results.
    """
    results = {}
    for name, settings in config.evaluation.sets.items():
        parts = parts_of_set(corpora[name], settings, config.training.sequence_length)
        sums = {source: _sum_losses(scorer, config.evaluation.batch_size, windows) for source, windows in parts.items()}
        losses = [loss * parts[source].scale for source, (loss, _) in sums.items()]
        stands_for = sum(tokens * parts[source].scale for source, (_, tokens) in sums.items())
        results[name] = _result(sum(losses) / stands_for, sum(tokens for _, tokens in sums.values()))
        results |= {
            f"{name}/{source}": _result(loss / tokens, tokens) for source, (loss, tokens) in sums.items() if source
        }
    return results


def _result(mean: float, tokens: int) -> EvaluationResult:
    return EvaluationResult(loss=mean, perplexity=math.exp(min(mean, 700.0)), tokens=tokens)


def _sum_losses(scorer: Scorer, batch_size: int, windows: EvaluationWindows) -> tuple[float, int]:
    """(sum of the losses in nats, tokens) over all ranks."""
    mesh = scorer.mesh
    columns = Columns.of_rank(windows.stream.sequence_length, mesh.sequence, mesh.shape.sequence)
    # fp64 on the host: the sum then hardly depends on how batches fall to ranks.
    loss_sum, tokens = 0.0, 0
    for turn in range(0, windows.count, batch_size * mesh.shape.data):
        first = turn + mesh.data * batch_size
        # A rank without windows of its own takes others': ZeRO-3 gathers weights only where all ranks take part.
        has_own = first < windows.count
        mesh.whereabouts.enter(EVALUATE)
        loss, count = scorer.evaluate_batch(windows.batch(first if has_own else turn, batch_size, columns))
        if has_own:
            loss_sum, tokens = loss_sum + loss, tokens + count
    total = torch.tensor([loss_sum, tokens], dtype=torch.float64, device=mesh.device)
    loss_sum, tokens = mesh.sum(total, group="world").tolist()
    return loss_sum, int(tokens)
