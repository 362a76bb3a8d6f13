"""The permutation is a bijection at every size and looks random in its high and low bits."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.ordering.order import derive_key, permute

POWERS = [2**k + d for k in range(11, 21) for d in (-1, 0, 1)]


def is_bijection(n: int, key: int) -> bool:
    return np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_bijection_at_every_small_size():
    assert [n for n in range(1, 2001) if not is_bijection(n, derive_key(n, "test"))] == []


@pytest.mark.parametrize("n", [*POWERS, 1_000_003])
def test_bijection_around_powers_of_two(n):
    assert is_bijection(n, 7)


def test_one_index_at_a_time_and_keys_per_index_agree_with_the_whole():
    n = 1234
    keys = np.array([derive_key(3, "epoch", e) for e in range(5)], dtype=np.uint64)
    together = permute(np.tile(np.arange(n), 5), n, np.repeat(keys, n)).reshape(5, n)
    for epoch, key in enumerate(keys):
        assert np.array_equal(together[epoch], permute(np.arange(n), n, int(key)))
        assert int(permute(np.array([77]), n, int(key))[0]) == together[epoch, 77]
    assert len({tuple(row) for row in together}) == 5


def test_order_is_fixed_for_ever():
    # Checkpoints rely on it: a change of these numbers needs another ORDER_VERSION.
    assert derive_key(0, "pool", 0) == 7387478220284938398
    assert permute(np.arange(8), 1000, 42).tolist() == [866, 242, 819, 285, 670, 583, 799, 311]


@pytest.mark.parametrize("n", [1_000_000, 306_152_344, 2**28])
@pytest.mark.parametrize("shift", ["low", "high"])
def test_serial_pairs_are_uniform(n, shift):
    """Pairs of neighbours, 6 bits each: |z| of the chi-square is below 5 (weak shuffles reach 25 to 30,000)."""
    count = min(n, 1_000_000) // 2 * 2
    out = permute(np.arange(count), n, derive_key(1, "quality"))
    six = out % 64 if shift == "low" else out * 64 // n
    cells = np.bincount(six[0::2] * 64 + six[1::2], minlength=4096)
    expected = count / 2 / 4096
    chi_square = ((cells - expected) ** 2 / expected).sum()
    assert abs(chi_square - 4095) / np.sqrt(2 * 4095) < 5


def test_neighbours_are_not_neighbours_afterwards():
    out = permute(np.arange(100_000), 1_000_000, 9)
    assert np.mean(np.abs(np.diff(out)) < 1000) < 0.01


def test_keys_do_not_repeat_across_seed_and_epoch():
    keys = {derive_key(seed, "source", s, epoch) for seed in range(30) for s in ("a", "b") for epoch in range(30)}
    assert len(keys) == 30 * 2 * 30


def test_an_index_outside_is_refused():
    with pytest.raises(ValueError, match=r"in range\(5\)"):
        permute(np.array([5]), 5, 0)
