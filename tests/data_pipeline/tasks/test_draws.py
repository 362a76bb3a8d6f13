"""Draws are the same everywhere and for ever, and as likely as they say."""

import numpy as np

from data_pipeline.tasks.draws import Draws


def test_draws_are_a_function_of_what_they_are_for():
    draws = Draws("parity", 0, "train", 7)
    # Written down once: another value here is another version of every task.
    assert draws.below(100, 5) == KNOWN
    assert Draws("parity", 0, "train", 7).below(100, 5) == KNOWN
    assert Draws("parity", 0, "train", 8).below(100, 5) != KNOWN
    assert Draws("parity", 1, "train", 7).below(100, 5) != KNOWN


def test_all_are_alike_likely():
    counts = np.bincount(Draws("a").below(7, 70_000), minlength=7)
    assert abs(counts - 10_000).max() < 500
    places = np.array([Draws("b", number).distinct(5, 3) for number in range(5000)])
    assert all(len(set(row)) == 3 for row in places.tolist())
    assert abs(np.bincount(places[:, 0], minlength=5) - 1000).max() < 150


def test_weights_are_shares_of_the_first_draw():
    weights = np.array([1.0, 2.0, 5.0])
    first = np.bincount([Draws("c", number).weighted(weights, 1)[0] for number in range(8000)], minlength=3)
    assert abs(first - 1000 * weights).max() < 200


KNOWN = [52, 7, 30, 26, 92]
