"""Held-out loss on named sets: every token of a set counts once, whatever the number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data_pipeline.stream import Corpus, sequential_batches
from train.config import EvaluationConfig, RunConfig
from train.engine import Engine


@dataclass(frozen=True)
class EvaluationResult:
    """Mean loss in nats per token, its exponential, and the number of tokens scored."""

    loss: float
    perplexity: float
    tokens: int


def open_evaluation_corpora(config: RunConfig, corpus: Corpus) -> dict[str, Corpus]:
    """The corpus of every evaluation set by set name. Raises ValueError when one cannot be read by the run's model."""
    corpora = {}
    for name, evaluation_set in config.evaluation.sets.items():
        own = evaluation_set.directory is None
        corpora[name] = corpus if own else Corpus.open(evaluation_set.directory)
        if corpora[name].manifest.tokenizer.fingerprint != corpus.manifest.tokenizer.fingerprint:
            raise ValueError(
                f"evaluation.sets.{name}.directory: {evaluation_set.directory} was prepared with another tokenizer than "
                f"corpus.directory ({config.corpus.directory}); prepare it again with the run's tokenizer"
            )
    return corpora


def evaluate(engine: Engine, config: EvaluationConfig, corpora: dict[str, Corpus]) -> dict[str, EvaluationResult]:
    """Score every set of `config`. Collective: all ranks call it and get equal results."""
    engine.deepspeed.eval()
    try:
        with torch.no_grad():
            return {name: _evaluate_set(engine, config, name, corpora[name]) for name in config.sets}
    finally:
        engine.deepspeed.train()


def _evaluate_set(engine: Engine, config: EvaluationConfig, name: str, corpus: Corpus) -> EvaluationResult:
    settings = config.sets[name]
    sequence_length = engine.config.training.sequence_length
    batches = sequential_batches(
        corpus,
        settings.split,
        sequence_length,
        config.batch_size,
        source=settings.source,
        max_tokens=settings.max_tokens,
    )
    world = engine.world
    # fp64 on the host: the sum then hardly depends on how batches fall to ranks.
    loss_sum, tokens = 0.0, 0
    turn: list = []
    for batch in batches:
        turn.append(batch)
        if len(turn) == world.size:
            loss, count = _score(engine, turn[world.rank])
            loss_sum, tokens, turn = loss_sum + loss, tokens + count, []
    if turn:
        # Ranks without a batch of their own still take part in ZeRO-3's gathering of weights.
        mine = turn[min(world.rank, len(turn) - 1)]
        loss, count = _score(engine, mine)
        if world.rank < len(turn):
            loss_sum, tokens = loss_sum + loss, tokens + count
    total = torch.tensor([loss_sum, tokens], dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    loss_sum, tokens = total.tolist()
    if not tokens:
        raise ValueError(f"evaluation.sets.{name}: no token to score in split '{settings.split}'")
    mean = loss_sum / tokens
    return EvaluationResult(loss=mean, perplexity=math.exp(min(mean, 700.0)), tokens=int(tokens))


def _score(engine: Engine, batch) -> tuple[float, int]:
    device = engine.world.device
    with engine.compute_context():
        loss = engine.deepspeed(batch.tokens.to(device), batch.targets.to(device), batch.document_start.to(device))
    return float(loss), int((batch.targets != -100).sum())
