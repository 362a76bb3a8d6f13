"""Which source a position of the run comes from: exact shares, whole epochs, clear refusals."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.mixture import BLOCK, Mixture

SIZES = {"a": 5000, "b": 1200, "c": 37}


def test_without_weights_each_epoch_visits_every_sample_once_in_a_new_order():
    mixture = Mixture(SIZES, None, seed=3)
    n = mixture.samples_per_epoch
    assert n == sum(SIZES.values())
    orders = []
    for epoch in range(2):
        numbers, epochs, samples = mixture.locate(np.arange(epoch * n, (epoch + 1) * n))
        pairs = list(zip(numbers.tolist(), samples.tolist(), strict=True))
        assert set(pairs) == {(k, i) for k, s in enumerate(mixture.sources) for i in range(SIZES[s])}
        assert len(pairs) == n and (epochs == epoch).all()
        orders.append(pairs)
    assert orders[0] != orders[1]


def test_weights_hold_exactly_in_every_block_and_epochs_of_a_source_are_whole():
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    mixture = Mixture(SIZES, weights, seed=3)
    blocks = 5
    numbers, epochs, samples = mixture.locate(np.arange(blocks * BLOCK))
    for block in range(blocks):
        counts = np.bincount(numbers[block * BLOCK : (block + 1) * BLOCK], minlength=3)
        assert counts.tolist() == [mixture.quotas[s] for s in mixture.sources]
        assert np.abs(counts / BLOCK - list(weights.values())).max() <= 1 / BLOCK
    for number, source in enumerate(mixture.sources):
        mine = np.flatnonzero(numbers == number)
        assert (np.diff(epochs[mine]) >= 0).all()
        for epoch in range(int(epochs[mine].max())):
            assert sorted(samples[mine][epochs[mine] == epoch]) == list(range(SIZES[source]))
    assert epochs[numbers == 2].max() >= 100


def test_weights_hold_nearly_at_every_prefix():
    numbers, _, _ = Mixture(SIZES, {"a": 1, "b": 1}, seed=0).locate(np.arange(3 * BLOCK))
    share = np.cumsum(numbers == 0) / np.arange(1, 3 * BLOCK + 1)
    assert np.abs(share[500:] - 0.5).max() < 0.08


def test_a_position_does_not_depend_on_what_is_asked_with_it():
    mixture = Mixture(SIZES, {"a": 2, "c": 1}, seed=1)
    whole = np.stack(mixture.locate(np.arange(10_000)))
    for position in (0, 1, BLOCK - 1, BLOCK, 9_999):
        assert np.array_equal(np.stack(mixture.locate(np.array([position])))[:, 0], whole[:, position])
    shuffled = np.random.default_rng(0).permutation(10_000)
    assert np.array_equal(np.stack(mixture.locate(shuffled)), whole[:, shuffled])


def test_seeds_give_different_orders():
    orders = {tuple(Mixture(SIZES, None, seed).locate(np.arange(50))[2].tolist()) for seed in range(20)}
    assert len(orders) == 20


def test_epochs_of_a_source():
    assert Mixture({"a": 100, "b": 50}, {"a": 1, "b": 1}, 0).epochs(200) == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "zz": 1}, "weights.zz: the corpus has no such source; it has a, b, c, short"),
        ({"a": -1}, "weights.a: a weight must be a finite number >= 0, not -1"),
        ({"a": float("nan")}, "weights.a: a weight must be a finite number"),
        ({"a": 0}, "at least one weight must be positive"),
        ({"a": 1, "b": 1e-7}, "weights.b: 1e-07 is below the resolution"),
        ({"a": 1, "short": 1}, "weights.short: the source has fewer tokens than one sample"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights, message):
    with pytest.raises(ValueError, match="weights") as error:
        Mixture({**SIZES, "short": 0}, weights, seed=0)
    assert message in str(error.value)


def test_every_problem_of_the_weights_is_named_at_once():
    with pytest.raises(ValueError, match=r"weights\.x.*weights\.a.*weights\.y"):
        Mixture(SIZES, {"x": 1, "a": -1, "y": 2}, seed=0)
