"""The fit of L(N, D): gradient, convergence from everywhere, duplicates, what it refuses and warns of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from launch.scaling import parametric
from launch.scaling.parametric import COEFFICIENTS, LossLaw, fit_law, loss, too_few
from tests.launch.recovery import WITH_GAMMA, Truth


@pytest.mark.parametrize("truth", [Truth(), WITH_GAMMA], ids=["gamma-1", "gamma-free"])
def test_the_gradient_is_that_of_the_objective(truth: Truth) -> None:
    generator = np.random.default_rng(0)
    problem = parametric._Problem(truth.runs(0.005, generator), truth.gamma != 1)
    counts = generator.integers(0, 3, truth.sizes * len(truth.budgets)).astype(float)
    point = problem.start(generator)
    _, gradient = problem._objective(point, counts)
    for place, step in enumerate(1e-6 * np.eye(len(point))):
        above, below = (problem._objective(point + sign * step, counts)[0] for sign in (1, -1))
        assert gradient[place] == pytest.approx((above - below) / 2e-6, rel=1e-5, abs=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("truth", [Truth(), WITH_GAMMA], ids=["gamma-1", "gamma-free"])
def test_every_start_ends_at_the_truth_where_there_is_no_noise(truth: Truth) -> None:
    """An optimiser that stops early, as with scipy's own tolerances, ends near its starts."""
    generator = np.random.default_rng(0)
    law = fit_law(truth.runs(0.0, generator), truth.gamma != 1, 0, generator, starts=12)
    assert law.coefficients == pytest.approx(truth.coefficients, rel=2e-3)
    assert np.abs(law.residuals).max() < 1e-5


def test_starts_agree_on_noisy_runs() -> None:
    generator = np.random.default_rng(3)
    law = fit_law(Truth().runs(0.005, generator), False, 0, generator, starts=16)
    assert law.starts == (16, 16)


def test_one_wild_run_moves_the_fit_little() -> None:
    """The Huber loss: a run that is off by 20 % counts as one that is off by 0.1 %."""
    generator = np.random.default_rng(0)
    runs = Truth().runs(0.002, generator)
    runs[10] = replace(runs[10], loss=1.2 * runs[10].loss)
    law = fit_law(runs, False, 0, generator, starts=8)
    assert law.coefficients[0] == pytest.approx(1.82, abs=0.1)
    assert law.residuals[10] == pytest.approx(-np.log(1.2), abs=0.01)


def test_the_same_generator_gives_the_same_fit() -> None:
    runs = Truth().runs(0.005, np.random.default_rng(0))
    one, other = (fit_law(runs, False, 5, np.random.default_rng(7), starts=3) for _ in range(2))
    assert (one.draws == other.draws).all() and (one.coefficients == other.coefficients).all()


def test_loss_is_the_formula() -> None:
    law = WITH_GAMMA
    expected = law.e + (law.a * 1e9**-law.alpha + law.b * 2e10**-law.beta) ** law.gamma
    assert loss(law.coefficients, np.array(1e9), np.array(2e10)) == pytest.approx(expected)
    assert len(COEFFICIENTS) == len(law.coefficients)


def test_too_few_runs_are_named_with_what_to_add() -> None:
    runs = Truth().runs(0.005, np.random.default_rng(0))
    assert too_few(runs, True) is None
    assert too_few(runs[:9], False) == "too few runs for 5 coefficients (9); add runs until there are 10"
    assert too_few(runs[:11], True) == "too few runs for 6 coefficients (11); add runs until there are 12"
    same_size = [replace(run, parameters=1e9) for run in runs]
    assert too_few(same_size, False) == "too few different sizes for an exponent (1); add runs until there are 4"


def test_what_the_runs_leave_open_is_said() -> None:
    coefficients = WITH_GAMMA.coefficients
    draws = np.tile(coefficients, (100, 1))
    law = LossLaw(coefficients, draws, True, 45, (12, 12), np.zeros(45))
    assert law.warnings() == []
    draws[:, 0], draws[:, 5] = np.linspace(0.0001, 2.0, 100), np.linspace(0.2, 3.0, 100)
    e, gamma, starts = replace(law, draws=draws, starts=(1, 12)).warnings()
    assert "do not tell E from 0; longer runs of larger models would" in e
    assert "hardly determine gamma (0.7 [0.24, 3])" in gamma
    assert "only 1 of 12 starts found this fit" in starts
