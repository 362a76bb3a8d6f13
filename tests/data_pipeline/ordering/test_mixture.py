"""Which source a position of the run comes from: exact shares, whole epochs, clear refusals."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.ordering.mixture import BLOCK, LARGEST_BLOCK, Mixture, MixtureConfig, Phase

SIZES = {"a": 5000, "b": 1200, "c": 37}


def test_without_weights_each_epoch_visits_every_sample_once_in_a_new_order():
    mixture = Mixture(SIZES, MixtureConfig(), seed=3)
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
    mixture = Mixture(SIZES, MixtureConfig(weights), seed=3)
    blocks = 5
    numbers, epochs, samples = mixture.locate(np.arange(blocks * BLOCK))
    for block in range(blocks):
        counts = np.bincount(numbers[block * BLOCK : (block + 1) * BLOCK], minlength=3)
        assert np.abs(counts / BLOCK - list(weights.values())).max() <= 1 / BLOCK
        # Rounding never adds up: the whole so far is within one sample of its share.
        so_far = np.bincount(numbers[: (block + 1) * BLOCK], minlength=3)
        exact = (block + 1) * BLOCK * np.array(list(weights.values()))
        assert np.abs(so_far - exact).max() <= 1
    for number, source in enumerate(mixture.sources):
        mine = np.flatnonzero(numbers == number)
        assert (np.diff(epochs[mine]) >= 0).all()
        for epoch in range(int(epochs[mine].max())):
            assert sorted(samples[mine][epochs[mine] == epoch]) == list(range(SIZES[source]))
    assert epochs[numbers == 2].max() >= 100


def test_weights_hold_nearly_at_every_prefix():
    numbers, _, _ = Mixture(SIZES, MixtureConfig({"a": 1, "b": 1}), seed=0).locate(np.arange(3 * BLOCK))
    share = np.cumsum(numbers == 0) / np.arange(1, 3 * BLOCK + 1)
    assert np.abs(share[500:] - 0.5).max() < 0.08


def test_a_position_does_not_depend_on_what_is_asked_with_it():
    mixture = Mixture(SIZES, MixtureConfig({"a": 2, "c": 1}), seed=1)
    whole = np.stack(mixture.locate(np.arange(10_000)))
    for position in (0, 1, BLOCK - 1, BLOCK, 9_999):
        assert np.array_equal(np.stack(mixture.locate(np.array([position])))[:, 0], whole[:, position])
    shuffled = np.random.default_rng(0).permutation(10_000)
    assert np.array_equal(np.stack(mixture.locate(shuffled)), whole[:, shuffled])


def test_seeds_give_different_orders():
    orders = {tuple(Mixture(SIZES, MixtureConfig(), seed).locate(np.arange(50))[2].tolist()) for seed in range(20)}
    assert len(orders) == 20


def test_epochs_of_a_source():
    mixture = Mixture({"a": 100, "b": 50}, MixtureConfig({"a": 1, "b": 1}), 0)
    assert mixture.epochs(2 * BLOCK) == {"a": BLOCK / 100, "b": BLOCK / 50}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "zz": 1}, "weights.zz: the corpus has no such source; it has a, b, c, short"),
        ({"a": -1}, "weights.a: a weight must be a finite number >= 0, not -1"),
        ({"a": float("nan")}, "weights.a: a weight must be a finite number"),
        ({"a": 0}, "at least one weight must be positive"),
        ({"a": 1, "b": 1e-7}, "weights.b: 1e-07 is less than one sample in 1,048,576"),
        ({"a": 1, "short": 1}, "weights.short: the source has fewer tokens than one sample"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights, message):
    with pytest.raises(ValueError, match="weights") as error:
        Mixture({**SIZES, "short": 0}, MixtureConfig(weights), seed=0)
    assert message in str(error.value)


def test_every_problem_of_the_weights_is_named_at_once():
    with pytest.raises(ValueError, match=r"weights\.x.*weights\.a.*weights\.y"):
        Mixture(SIZES, MixtureConfig({"x": 1, "a": -1, "y": 2}), seed=0)


def located(mixture: Mixture, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return mixture.locate(np.arange(count))


SLIMPAJAMA = {"arxiv": 4.6, "books": 4.2, "c4": 26.7, "cc": 52.2, "github": 5.2, "stack": 3.3, "wiki": 3.8}


@pytest.mark.parametrize(
    "config",
    [
        MixtureConfig(SLIMPAJAMA),
        MixtureConfig(temperature=3.0),
        MixtureConfig(SLIMPAJAMA, phases=(Phase(7000, {"books": 1, "wiki": 3}), Phase(20_001, temperature=1.0))),
        MixtureConfig(SLIMPAJAMA, epoch_caps={"books": 2.5, "stack": 1}),
    ],
    ids=["weights", "temperature", "phases", "caps"],
)
def test_every_source_goes_through_whole_epochs_in_turn_and_counts_are_exact(config):
    sizes = {label: 3000 + 700 * n for n, label in enumerate(SLIMPAJAMA)}
    mixture = Mixture(sizes, config, seed=5)
    count = 60_000
    numbers, epochs, samples = located(mixture, count)
    for number, label in enumerate(mixture.sources):
        mine = numbers == number
        assert (np.diff(epochs[mine]) >= 0).all()
        for epoch in range(int(epochs[mine].max(initial=-1)) + 1):
            visited = np.sort(samples[mine][epochs[mine] == epoch])
            assert len(np.unique(visited)) == len(visited)
            if epoch < epochs[mine].max():
                assert visited.tolist() == list(range(sizes[label]))
    for prefix in (0, 1, 4095, 4097, 6999, 7001, 20_003, 59_999, count):
        expected = np.bincount(numbers[:prefix], minlength=7).tolist()
        assert list(mixture.counts(prefix).values()) == expected


def test_weights_hold_within_sampling_error_at_every_prefix():
    """|share - weight| below 5 standard deviations of independent draws, at each of 300,000 prefixes."""
    mixture = Mixture(dict.fromkeys(SLIMPAJAMA, 50_000), MixtureConfig(SLIMPAJAMA), seed=1)
    numbers, _, _ = located(mixture, 300_000)
    counted = np.arange(1, len(numbers) + 1)
    for number, label in enumerate(mixture.sources):
        weight = SLIMPAJAMA[label] / 100
        error = np.abs(np.cumsum(numbers == number) - weight * counted)
        assert (error <= 1 + 5 * np.sqrt(weight * (1 - weight) * counted)).all()
        assert error[-1] <= 1 + 5 * np.sqrt(weight * BLOCK)


def test_temperature_moves_shares_from_proportional_to_even():
    def shares(temperature):
        mixture = Mixture({"large": 9000, "small": 1000}, MixtureConfig(temperature=temperature), 0)
        return mixture.counts(10 * BLOCK)["small"] / (10 * BLOCK)

    assert shares(1.0) == pytest.approx(0.1, abs=1e-4)
    assert shares(2.0) == pytest.approx(1 / 4, abs=1e-4)
    assert shares(1e6) == pytest.approx(0.5, abs=1e-4)


def test_a_phase_changes_the_shares_at_its_sample_and_continues_each_sources_epoch():
    start = 10_001
    phases = (Phase(start, {"b": 1}),)
    mixture = Mixture(SIZES, MixtureConfig({"a": 1, "b": 1}, phases=phases), seed=2)
    before = Mixture(SIZES, MixtureConfig({"a": 1, "b": 1}), seed=2)
    numbers, epochs, samples = located(mixture, start + 5000)
    for mine, theirs in zip((numbers, epochs, samples), located(before, start), strict=True):
        assert np.array_equal(mine[:start], theirs)
    assert set(numbers[start:].tolist()) == {1}
    b = numbers == 1
    for epoch in range(int(epochs[b].max())):
        assert sorted(samples[b][epochs[b] == epoch]) == list(range(SIZES["b"]))
    assert b.sum() == mixture.counts(start + 5000)["b"]


def test_a_source_is_left_out_at_its_cap_exactly_and_others_share_its_place():
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    mixture = Mixture(SIZES, MixtureConfig(weights, epoch_caps={"c": 3, "b": 1.5}), seed=0)
    numbers, epochs, samples = located(mixture, 60_000)
    assert np.bincount(numbers).tolist()[1:] == [1800, 111]
    for epoch in range(3):
        assert sorted(samples[(numbers == 2) & (epochs == epoch)]) == list(range(37))
    last_c, last_b = (np.flatnonzero(numbers == number)[-1] for number in (2, 1))
    assert last_c < last_b and np.mean(numbers[last_c + 1 : last_b] == 0) == pytest.approx(0.5 / 0.8, abs=0.05)
    assert (numbers[last_b + 1 :] == 0).all()
    assert mixture.epochs(60_000)["c"] == 3.0 and mixture.limit is None


def test_a_run_ends_where_every_source_has_reached_its_cap():
    mixture = Mixture(SIZES, MixtureConfig({"a": 1, "b": 1, "c": 1}, epoch_caps={"a": 1, "b": 2, "c": 3}), seed=0)
    assert mixture.limit == 5000 + 2 * 1200 + 3 * 37
    numbers, _, _ = located(mixture, mixture.limit)
    assert np.bincount(numbers).tolist() == [5000, 2400, 111]
    with pytest.raises(ValueError, match="every source has reached its cap after 7511 samples"):
        mixture.locate(np.array([7511]))


def test_a_rare_source_gets_a_larger_block():
    sizes = {"common": 1000, "rare": 1000}
    mixture = Mixture(sizes, MixtureConfig({"common": 1, "rare": 3 / LARGEST_BLOCK}), seed=0)
    numbers, _, _ = located(mixture, LARGEST_BLOCK)
    assert np.count_nonzero(numbers) == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixtureConfig(temperature=0.0), "temperature: must be a finite number above 0, not 0.0"),
        (MixtureConfig({"a": 1}, temperature=2.0), "temperature: cannot be combined with weights"),
        (MixtureConfig(epoch_caps={"zz": 2}), "epoch_caps.zz: the corpus has no such source; it has a, b, c"),
        (MixtureConfig(epoch_caps={"a": 0}), "epoch_caps.a: must be a finite number above 0, not 0"),
        (
            MixtureConfig(epoch_caps={"a": 1e-4, "b": 0.0008, "c": 0.02}),
            "epoch_caps: no source has a whole sample below",
        ),
        (MixtureConfig(temperature=0.01), "temperature: gives shares that are too large to compute (0.01)"),
        (MixtureConfig(phases=(Phase(5, None, 1e-320),)), "phases[0].temperature: gives shares that are too large"),
        (MixtureConfig({"a": 1e308, "b": 1e308}), "weights: gives shares that are too large to compute ({'a': 1e+308"),
        (MixtureConfig(phases=(Phase(0),)), "phases: a phase must start after sample 0, not at 0"),
        (MixtureConfig(phases=(Phase(5), Phase(5))), "phases: two start at sample 5"),
        (MixtureConfig(phases=(Phase(5, {"zz": 1}),)), "phases[0].weights.zz: the corpus has no such source"),
    ],
)
def test_mixtures_that_cannot_be_used_are_refused(config, message):
    with pytest.raises(ValueError, match="temperature|epoch_caps|phases|weights") as error:
        Mixture(SIZES, config, seed=0)
    assert message in str(error.value)
