"""The n-gram baselines against counting by hand, and on the tokens that evaluation scores."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from conf import compose
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.reading.batch import Batch
from tests.runs import TINY_RUN
from train import ngram_baselines
from train.config import RunConfig
from train.evaluate import open_windows
from train.ngram_baselines import (
    SMOOTHING_GRID,
    PairCounts,
    bigram_loss,
    unigram_loss,
    write_baselines,
)

VOCAB = 7


def batches(seed: int, count: int, rows: int = 3, length: int = 11) -> list[Batch]:
    """Random batches over few ids, with masked targets here and there."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        tokens = torch.from_numpy(generator.integers(0, VOCAB, (rows, length)) ** 2 % VOCAB)
        targets = torch.from_numpy((generator.integers(0, VOCAB, (rows, length)) + tokens.numpy()) % VOCAB)
        targets[torch.from_numpy(generator.random((rows, length)) < 0.2)] = -100
        made.append(Batch(tokens, targets, torch.zeros(rows, length, dtype=torch.bool), ["a"] * rows))
    return made


def pairs(of: list[Batch]) -> list[tuple[int, int]]:
    return [
        (int(a), int(b))
        for batch in of
        for a, b in zip(batch.tokens.flatten(), batch.targets.flatten(), strict=True)
        if b != -100
    ]


def by_hand(train: list[Batch], held_out: list[Batch], k: float) -> tuple[float, float]:
    """Losses of both models, token by token."""
    bigrams, scored = Counter(pairs(train)), pairs(held_out)
    firsts, seconds = Counter(a for a, _ in pairs(train)), Counter(b for _, b in pairs(train))
    total = len(pairs(train))
    unigram = [-math.log((seconds[b] + k) / (total + k * VOCAB)) for _, b in scored]
    bigram = [-math.log((bigrams[a, b] + k) / (firsts[a] + k * VOCAB)) for a, b in scored]
    return sum(unigram) / len(scored), sum(bigram) / len(scored)


@pytest.mark.parametrize("k", [1e-3, 0.5, 10.0])
def test_losses_equal_counting_by_hand(k):
    train, held_out = batches(0, 2), batches(1, 2)
    counted, scored = PairCounts.of(train, VOCAB), PairCounts.of(held_out, VOCAB)
    unigram, bigram = by_hand(train, held_out, k)
    assert unigram_loss(counted, scored, k) == pytest.approx(unigram, rel=1e-12)
    assert bigram_loss(counted, scored, k) == pytest.approx(bigram, rel=1e-12)
    assert scored.total == len(pairs(held_out))


def test_counting_in_pieces_changes_nothing(monkeypatch):
    whole = PairCounts.of(batches(0, 20), VOCAB)
    monkeypatch.setattr(ngram_baselines, "_PAIRS_TOGETHER", 50)
    pieces = PairCounts.of(batches(0, 20), VOCAB)
    assert np.array_equal(whole.keys, pieces.keys)
    assert np.array_equal(whole.counts, pieces.counts)


def test_the_probabilities_of_each_model_sum_to_one():
    counted = PairCounts.of(batches(0, 1, rows=1), VOCAB)
    every_next = [
        Batch(torch.tensor([[2]]), torch.tensor([[b]]), torch.zeros(1, 1, dtype=torch.bool), ["a"])
        for b in range(VOCAB)
    ]
    for loss in (unigram_loss, bigram_loss):
        losses = [loss(counted, PairCounts.of([one], VOCAB), 0.3) for one in every_next]
        assert sum(math.exp(-x) for x in losses) == pytest.approx(1.0)


def test_a_large_vocabulary_is_sparse():
    batch = Batch(torch.tensor([[49_999, 3]]), torch.tensor([[3, 49_999]]), torch.zeros(1, 2, dtype=torch.bool), ["a"])
    counted = PairCounts.of([batch], 50_000)
    assert counted.keys.tolist() == [3 * 50_000 + 49_999, 49_999 * 50_000 + 3]


def test_k_is_the_best_on_the_held_back_part_and_everything_is_counted_for_the_score():
    train, held_out = batches(0, 30), batches(1, 3)
    counted, held_back = train[3:], train[:3]
    result = ngram_baselines.ngram_baselines(counted, held_back, [held_out], VOCAB)
    for place, name in enumerate(("unigram", "bigram")):
        best = min(SMOOTHING_GRID, key=lambda k, place=place: by_hand(counted, held_back, k)[place])
        assert result[name]["k"] == best
        assert result[name]["loss"] == pytest.approx(by_hand(train, held_out, best)[place], rel=1e-12)
    assert result["tokens"] == len(pairs(held_out))


def test_empty_splits_are_named():
    with pytest.raises(ValueError, match="the held-out text has no token to predict"):
        ngram_baselines.ngram_baselines(batches(0, 3), batches(1, 1), [], VOCAB)


@pytest.mark.slow
def test_a_corpus_is_scored_on_the_tokens_of_evaluation_and_only_once(small_corpus, tmp_path, monkeypatch):
    overrides = ["name=run", f"corpus.directory={small_corpus}", "training.total_steps=4", *TINY_RUN]
    config = compose(RunConfig, "train", overrides)
    path = tmp_path / "baselines.json"
    result = write_baselines(config, path)
    windows = open_windows(Corpus.open(small_corpus), config.evaluation.sets["validation"], 32)
    scored = windows.batch(0, windows.count)
    assert result["tokens"] == int((scored.targets != -100).sum()) == 256
    assert 0 < result["bigram"]["loss"] < result["unigram"]["loss"] < math.log(384)
    assert json.loads(path.read_text()) == result

    monkeypatch.setattr(ngram_baselines, "ngram_baselines", lambda *_: pytest.fail("counted again"))
    assert write_baselines(config, path) == result
    with pytest.raises(ValueError, match="no set 'test'; the run has validation"):
        write_baselines(config, path, "test")
