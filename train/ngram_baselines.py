"""What counting alone achieves on the held-out text: a unigram and a bigram model with add-k smoothing.

Both are counted on the whole train split and scored on exactly the targets that `train.evaluate` scores, so their
losses stand beside the model's. With count c, vocabulary V and N targets in all:

    unigram  p(b) = (c(b) + k) / (N + k V)          bigram  p(b | a) = (c(a, b) + k) / (c(a) + k V)

k is chosen from `SMOOTHING_GRID`, for each model by itself, on a tenth of the train split that is held back for it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.passwords import without_passwords
from data_pipeline.reading.batch import MASKED, Batch
from data_pipeline.reading.stream import WindowStream
from train.config import RunConfig
from train.data import open_corpus
from train.evaluate import EvaluationWindows, open_evaluation_corpora, parts_of_set
from train.run_directory import write_atomically

# 2: parts of a set that `max_tokens` cuts are weighted.
FORMAT_VERSION = 2
SMOOTHING_GRID = tuple(float(k) for k in 10.0 ** np.arange(-4, 1.5, 0.5))
# One train window in so many is held back to choose k.
HELD_BACK_EVERY = 10
_TRAIN_WINDOW = 4096
_BATCH = 256
# Pairs that are counted together: bounds memory, and sorts stay in the cache's reach.
_PAIRS_TOGETHER = 1 << 24


@dataclass(frozen=True)
class PairCounts:
    """How often each pair (token, next token) occurs; only pairs that occur are stored.

    keys: int64, ascending, token * vocab_size + next token. counts: int64, of each key.
    """

    vocab_size: int
    keys: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(batches: Iterable[Batch], vocab_size: int) -> PairCounts:
        """Count every target of `batches` that is not masked, with the input token before it."""
        total = PairCounts(vocab_size, np.empty(0, np.int64), np.empty(0, np.int64))
        waiting: list[np.ndarray] = []
        pairs = 0
        for batch in batches:
            tokens, targets = batch.tokens.numpy(), batch.targets.numpy()
            valid = targets != MASKED
            waiting.append(tokens[valid] * vocab_size + targets[valid])
            pairs += len(waiting[-1])
            if pairs >= _PAIRS_TOGETHER:
                total, waiting, pairs = total + _count(np.concatenate(waiting), vocab_size), [], 0
        return total + _count(np.concatenate(waiting), vocab_size) if waiting else total

    def __add__(self, other: PairCounts) -> PairCounts:
        keys, places = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, places, np.concatenate([self.counts, other.counts]))
        return PairCounts(self.vocab_size, keys, counts)

    @property
    def total(self) -> int:
        """All targets counted."""
        return int(self.counts.sum())

    def of_keys(self, keys: np.ndarray) -> np.ndarray:
        """Count of each of `keys`, 0 for a pair that never occurred."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.counts[places], 0)

    def of_first(self) -> np.ndarray:
        """How often each token was followed by a target, [vocab_size]."""
        return np.bincount(self.keys // self.vocab_size, self.counts, self.vocab_size)

    def of_second(self) -> np.ndarray:
        """How often each token was a target, [vocab_size]."""
        return np.bincount(self.keys % self.vocab_size, self.counts, self.vocab_size)


def _count(keys: np.ndarray, vocab_size: int) -> PairCounts:
    return PairCounts(vocab_size, *np.unique(keys, return_counts=True))


def unigram_loss(train: PairCounts, held_out: PairCounts, k: float) -> float:
    """Mean loss (nats per token) of the targets in `held_out` under the unigram model counted in `train`."""
    log_probability = np.log(train.of_second() + k) - np.log(train.total + k * train.vocab_size)
    return float(-(held_out.of_second() @ log_probability) / held_out.total)


def bigram_loss(train: PairCounts, held_out: PairCounts, k: float) -> float:
    """Mean loss (nats per token) of the targets in `held_out` under the bigram model counted in `train`."""
    context = train.of_first()[held_out.keys // train.vocab_size]
    log_probability = np.log(train.of_keys(held_out.keys) + k) - np.log(context + k * train.vocab_size)
    return float(-(held_out.counts @ log_probability) / held_out.total)


def ngram_baselines(
    counted: Iterable[Batch],
    held_back: Iterable[Batch],
    held_out: Sequence[Iterable[Batch]],
    vocab_size: int,
    scales: Sequence[float] | None = None,
) -> dict[str, Any]:
    """`{"tokens": n, "unigram": {"loss", "k"}, "bigram": {"loss", "k"}}` of the targets in `held_out`.

    `counted` and `held_back` are the two parts of the train split: k is the best for `held_back` after counting
    `counted`, and both are counted for the result. `held_out`: the batches of each part of the scored set; `scales`:
    the weight of a target in each (None: 1). Raises ValueError when a part has no target.
    """
    train, tuning = (PairCounts.of(batches, vocab_size) for batches in (counted, held_back))
    scored = [PairCounts.of(batches, vocab_size) for batches in held_out]
    weights = [part.total * scale for part, scale in zip(scored, scales or [1.0] * len(scored), strict=True)]
    for name, total in (("train", train.total), ("held-back train", tuning.total), ("held-out", sum(weights))):
        if not total:
            raise ValueError(f"n-gram baselines: the {name} text has no token to predict; prepare more text")
    everything = train + tuning
    baselines: dict[str, Any] = {"tokens": sum(part.total for part in scored)}
    for name, loss in (("unigram", unigram_loss), ("bigram", bigram_loss)):
        losses = {k: loss(train, tuning, k) for k in SMOOTHING_GRID}
        k = min(losses, key=lambda k: losses[k])  # noqa: B023 - called at once
        weighted = [weight * loss(everything, part, k) for part, weight in zip(scored, weights, strict=True) if weight]
        baselines[name] = {"loss": sum(weighted) / sum(weights), "k": k}
    return baselines


def _batches(windows: EvaluationWindows) -> Iterator[Batch]:
    return (windows.batch(first, _BATCH) for first in range(0, windows.count, _BATCH))


def write_baselines(config: RunConfig, path: Path, set_name: str | None = None) -> dict[str, Any]:
    """Score the baselines on one evaluation set of `config` (the first one by default) and write them to `path`.

    A file there that belongs to the same data is returned as it is. Raises ValueError for an unknown set.
    """
    corpus = open_corpus(config, config.corpus.directory, "size")
    sets = config.evaluation.sets
    name = set_name or next(iter(sets), None)
    if name not in sets:
        raise ValueError(f"evaluation.sets: no set '{name}'; the run has {', '.join(sets) or 'none'}")
    held_out_corpus = open_evaluation_corpora(config, corpus)[name]
    identity = {
        "format_version": FORMAT_VERSION,
        "set": name,
        "settings": without_passwords(dataclasses.asdict(sets[name])),
        "sequence_length": config.training.sequence_length,
        "train_split": config.corpus.split,
        "train_corpus": corpus.fingerprint,
        "held_out_corpus": held_out_corpus.fingerprint,
    }
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if {key: kept.get(key) for key in identity} == identity:
            return kept
    train = WindowStream(corpus, config.corpus.split, _TRAIN_WINDOW)
    parts = list(parts_of_set(held_out_corpus, sets[name], config.training.sequence_length).values())
    baselines = ngram_baselines(
        (train.batch(window, 1) for window in range(train.windows) if window % HELD_BACK_EVERY),
        (train.batch(window, 1) for window in range(0, train.windows, HELD_BACK_EVERY)),
        [_batches(part) for part in parts],
        corpus.vocab_size,
        [part.scale for part in parts],
    )
    result = identity | baselines
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    return result
