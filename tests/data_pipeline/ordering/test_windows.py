"""The windowed order: each pass visits every sample once, a window at a time, whoever asks for what."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.remote import CacheSettings
from data_pipeline.ordering.mixture import MixtureConfig
from data_pipeline.ordering.order import derive_key
from data_pipeline.ordering.windows import WindowedOrder
from data_pipeline.reading.loader import StepLoader
from data_pipeline.reading.stream import Lanes, SampleStream

# Samples that begin in each shard.
SHARDS = [[1], [1, 1, 1], [7], [0, 5, 0], [3, 0, 0, 9, 1, 4], list(range(40)), [1000, 1, 333] * 9, [64] * 16]


def bounds_of(sizes):
    return np.concatenate([[0], np.cumsum(sizes)])


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("sizes", SHARDS, ids=str)
def test_each_pass_is_a_bijection_that_takes_whole_windows_of_shards(sizes, window):
    bounds = bounds_of(sizes)
    order = WindowedOrder(bounds, window, partial(derive_key, 3))
    n = int(bounds[-1])
    passes = [order.permute(np.arange(n), number) for number in range(4)]
    for visited in passes:
        assert np.array_equal(np.sort(visited), np.arange(n))
        shards = np.searchsorted(bounds, visited, side="right") - 1
        # Numbered as they first occur, the shards come W by W.
        turn = {shard: place // window for place, shard in enumerate(dict.fromkeys(shards.tolist()))}
        assert (np.diff([turn[shard] for shard in shards.tolist()]) >= 0).all()
    if n > 20:
        assert len({tuple(visited.tolist()) for visited in passes}) == 4
    chosen = np.random.default_rng(0).permutation(n)[:50]
    again = WindowedOrder(bounds, window, partial(derive_key, 3))
    assert np.array_equal(again.permute(chosen, 2), passes[2][chosen])
    assert again.permute(chosen[:1], 2).tolist() == [passes[2][chosen[0]]]


def test_the_windowed_order_is_fixed_for_ever():
    # Checkpoints rely on it: a change of these numbers needs another WINDOWS_VERSION.
    order = WindowedOrder(bounds_of([5, 0, 4, 3, 6]), 2, partial(derive_key, 0, "pool"))
    assert order.permute(np.arange(18), 1).tolist() == [8, 15, 12, 5, 13, 16, 14, 6, 17, 7, 9, 2, 1, 10, 3, 4, 11, 0]


def test_serial_pairs_inside_a_window_are_uniform():
    """|z| of the chi-square of pairs of neighbours, 6 bits each, below 5, as for a full permutation."""
    order = WindowedOrder(bounds_of([25_000] * 40), 16, partial(derive_key, 1))
    visited = order.permute(np.arange(400_000), 0)
    # Ranks within the window, so that which shards it has does not matter.
    ranks = np.argsort(np.argsort(visited))
    six = ranks * 64 // len(ranks)
    cells = np.bincount(six[0::2] * 64 + six[1::2], minlength=4096)
    expected = len(ranks) / 2 / 4096
    assert abs(((cells - expected) ** 2 / expected).sum() - 4095) / np.sqrt(2 * 4095) < 5


MIXTURES = {
    "pool": MixtureConfig(),
    "weights": MixtureConfig({"RedPajamaC4": 3, "RedPajamaBook": 1}),
    "caps": MixtureConfig(temperature=2.0, epoch_caps={"RedPajamaGithub": 1.5}),
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("lanes", [None, Lanes(6, 3)], ids=["samples", "lanes"])
def test_epochs_are_whole_and_the_counts_of_sources_are_those_of_the_full_permutation(corpus, mixture, lanes):
    full = SampleStream(corpus, "train", 20, 2, mixture, lanes=lanes)
    stream = SampleStream(corpus, "train", 20, 2, mixture, lanes=lanes, window_shards=2)
    places = np.arange(3 * stream.mixture.samples_per_epoch + 17)
    numbers, epochs, samples = stream.mixture.locate(places)
    expected = full.mixture.locate(places)
    if mixture is not MIXTURES["pool"]:
        assert np.array_equal(numbers, expected[0]) and np.array_equal(epochs, expected[1])
    assert not np.array_equal(samples, expected[2])
    for number, source in enumerate(stream.mixture.sources):
        for epoch in range(int(epochs[numbers == number].max(initial=0))):
            mine = samples[(numbers == number) & (epochs == epoch)]
            assert np.array_equal(np.sort(mine), np.arange(stream.mixture.sizes[source]))
    assert stream.fingerprint != full.fingerprint
    assert full.identity == {**stream.identity, "window_shards": None}


@pytest.mark.parametrize(("replicas", "micro", "workers"), [(1, 24, 1), (3, 4, 2), (8, 1, 3)])
def test_the_windowed_order_does_not_depend_on_the_world(corpus, replicas, micro, workers):
    streams = [SampleStream(corpus, "train", 20, 2, window_shards=3) for _ in range(replicas + 1)]
    loaders = [
        StepLoader(
            streams[replica],
            global_batch_size=24,
            micro_batch_size=micro,
            replica=replica,
            replicas=replicas,
            first_sample=48,
            workers=workers,
        )
        for replica in range(replicas)
    ]
    rows = [part.tokens for _ in range(5) for loader in loaders for part in next(loader)]
    for loader in loaders:
        loader.close()
    assert torch.equal(torch.cat(rows), streams[-1].batch(48, 120).tokens)


def test_few_shards_are_open_at_a_time(corpus, tmp_path):
    cache = CacheSettings(tmp_path / "cache", 2**26)
    remote = Corpus.open(f"file://{corpus.directory}", cache=cache)
    stream = SampleStream(remote, "train", 20, 0, window_shards=2)
    full = SampleStream(corpus, "train", 20, 0)
    begun = [stream.origin(index).parts[0][0] for index in range(stream.samples_per_epoch)]
    # The samples of the smallest window: any so many in a row lie in two windows at most.
    count = sum(sorted(Counter(begun).values())[:2])
    assert all(len(set(begun[i : i + count])) <= 4 for i in range(len(begun)))
    assert len({full.origin(index).parts[0][0] for index in range(count)}) > 4
    # What the first samples bring into the cache: their two shards, and those that the last samples of these end in.
    stream.batch(0, count)
    assert 2 <= len(list(cache.directory.glob("*/shards/*.arrow"))) <= 4


def test_what_windows_do_not_support_is_refused(corpus):
    with pytest.raises(ValueError, match=r"window_shards: needs at least 1 shard and packing=concatenate.* got 0"):
        SampleStream(corpus, "train", 20, 0, window_shards=0)
    with pytest.raises(ValueError, match=r"window_shards: .*, got 2 and best_fit"):
        SampleStream(corpus, "train", 20, 0, window_shards=2, packing="best_fit")
