"""The fits find a known law again, within their own intervals, in at least 90 of 100 draws of 0.5 % noise.

docs/log.md has the whole protocol (100 draws with 200 resamples each, minutes): `python -m tests.launch.recovery`.
"""

from __future__ import annotations

import numpy as np
import pytest

from launch.scaling.parametric import fit_law
from tests.launch.recovery import WITH_GAMMA, Truth, isoflop_is_recovered, law_is_recovered


@pytest.mark.slow
@pytest.mark.parametrize(("truth", "draws"), [(Truth(), 20), (WITH_GAMMA, 10)], ids=["gamma-1", "gamma-free"])
def test_l_of_n_and_d_is_recovered_in_nine_of_ten_draws(truth: Truth, draws: int) -> None:
    """Every coefficient, and both exponents of the optimum, in the same draw."""
    found = [law_is_recovered(truth, draw, resamples=40, starts=4) for draw in range(draws)]
    assert sum(all(one.values()) for one in found) >= 0.9 * draws, found


def test_isoflop_exponents_are_recovered_in_nine_of_ten_draws() -> None:
    found = [isoflop_is_recovered(Truth(), draw) for draw in range(100)]
    for figure in found[0]:
        assert sum(one[figure] for one in found) >= 90, figure


def test_intervals_are_no_wider_than_the_noise_makes_them() -> None:
    """Endless intervals would contain every truth. Fits of many draws of the noise say how far they scatter."""
    truth = Truth()
    fits = []
    for draw in range(12):
        generator = np.random.default_rng(100 + draw)
        fits.append(fit_law(truth.runs(0.005, generator), False, 0, generator, 4).coefficients)
    generator = np.random.default_rng(0)
    figures = fit_law(truth.runs(0.005, generator), False, 60, generator, 8).figures()
    for name, scatter in zip(("E", "ln A", "ln B", "alpha", "beta"), np.std(fits, axis=0), strict=False):
        half = (figures[name].high - figures[name].low) / 2
        assert 0.4 * 1.96 * scatter < half < 3 * 1.96 * scatter, name
