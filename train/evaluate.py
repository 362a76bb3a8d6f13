"""Held-out loss on named sets: every token of a set counts once, whatever the number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from data_pipeline.corpus import Corpus
from data_pipeline.stream import Batch, WindowStream
from train.config import EvaluationConfig, EvaluationSetConfig, RunConfig

if TYPE_CHECKING:
    # The trainer's: importing DeepSpeed takes seconds, and what only opens held-out sets does without.
    from train.engine import Engine


@dataclass(frozen=True)
class EvaluationResult:
    """Mean loss in nats per token, its exponential, and the number of tokens scored."""

    loss: float
    perplexity: float
    tokens: int


def open_evaluation_corpora(config: RunConfig, corpus: Corpus, check: str = "hash") -> dict[str, Corpus]:
    """The corpus of every evaluation set by set name. Raises ValueError when one cannot be read by the run's model."""
    corpora = {}
    for name, evaluation_set in config.evaluation.sets.items():
        own = evaluation_set.directory is None
        corpora[name] = corpus if own else Corpus.open(evaluation_set.directory, check)
        if corpora[name].tokenizer().fingerprint != corpus.tokenizer().fingerprint:
            raise ValueError(
                f"evaluation.sets.{name}.directory: {evaluation_set.directory} was prepared with another tokenizer "
                f"than corpus.directory ({config.corpus.directory}); prepare it again with the run's tokenizer"
            )
    return corpora


@dataclass(frozen=True)
class EvaluationWindows:
    """The windows of one set, in order, up to its limit of tokens."""

    stream: WindowStream
    count: int

    def batch(self, first: int, size: int) -> Batch:
        return self.stream.batch(first, min(size, self.count - first))


def open_windows(corpus: Corpus, settings: EvaluationSetConfig, sequence_length: int) -> EvaluationWindows:
    """What evaluation scores, exactly; also used to score the n-gram baselines on the same tokens."""
    stream = WindowStream(corpus, settings.split, sequence_length, settings.source)
    limit = stream.windows if settings.max_tokens is None else -(-settings.max_tokens // sequence_length)
    return EvaluationWindows(stream, min(limit, stream.windows))


def evaluate(engine: Engine, config: EvaluationConfig, corpora: dict[str, Corpus]) -> dict[str, EvaluationResult]:
    """Score every set of `config`. Collective: all ranks call it and get equal results."""
    engine.deepspeed.eval()
    try:
        with torch.no_grad():
            return {name: _evaluate_set(engine, config, name, corpora[name]) for name in config.sets}
    finally:
        engine.deepspeed.train()


def _evaluate_set(engine: Engine, config: EvaluationConfig, name: str, corpus: Corpus) -> EvaluationResult:
    windows = open_windows(corpus, config.sets[name], engine.config.training.sequence_length)
    world = engine.world
    # fp64 on the host: the sum then hardly depends on how batches fall to ranks.
    loss_sum, tokens = 0.0, 0
    for turn in range(0, windows.count, config.batch_size * world.size):
        first = turn + world.rank * config.batch_size
        # A rank without windows of its own takes others': ZeRO-3 gathers weights only where all ranks take part.
        has_own = first < windows.count
        loss, count = _score(engine, windows.batch(first if has_own else turn, config.batch_size))
        if has_own:
            loss_sum, tokens = loss_sum + loss, tokens + count
    total = torch.tensor([loss_sum, tokens], dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    loss_sum, tokens = total.tolist()
    mean = loss_sum / tokens
    return EvaluationResult(loss=mean, perplexity=math.exp(min(mean, 700.0)), tokens=int(tokens))


def _score(engine: Engine, batch: Batch) -> tuple[float, int]:
    device = engine.world.device
    with engine.compute_context():
        loss = engine.deepspeed(batch.tokens.to(device), batch.targets.to(device), batch.document_start.to(device))
    return float(loss), int((batch.targets != -100).sum())
