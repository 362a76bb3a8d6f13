"""IsoFLOP curves: exact where there is no noise, budgets found or named, and why a budget is left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from launch.scaling.isoflop import IsoFlop, by_budget, fit_isoflop
from launch.scaling.runs import ScalingRun
from tests.launch.recovery import Truth

OPTIMA = {budget: 1e8 * (budget / 1e18) ** 0.5 for budget in (1e18, 1e19, 1e20, 1e21)}


def fit(runs: list[ScalingRun]) -> IsoFlop:
    return fit_isoflop(runs, 200, np.random.default_rng(0))


def parabolas(optima: dict[float, float], sizes: int = 7) -> list[ScalingRun]:
    """Runs of which log losses are parabolas exactly, least at the given size of each budget."""
    found = []
    for budget, optimum in optima.items():
        for x in np.linspace(-1.2, 0.9, sizes):
            size = optimum * np.exp(x)
            loss = float(np.exp(1 - 0.02 * np.log(budget / 1e18) + 0.03 * x**2))
            found.append(ScalingRun("r", "f", size, budget / (6 * size), budget, None, loss, budget))
    return found


def test_exact_parabolas_give_their_optima_and_exponents() -> None:
    optima = {budget: 1e8 * (budget / 1e18) ** 0.6 for budget in (1e18, 1e19, 1e20)}
    found = fit(parabolas(optima))
    assert found.left_out == []
    for curve in found.curves:
        assert curve.optimal["parameters"] == pytest.approx(optima[curve.budget], rel=1e-6)
        assert curve.optimal["tokens"] == pytest.approx(curve.budget / (6 * optima[curve.budget]), rel=1e-6)
        assert curve.losses(np.array(curve.optimal["parameters"])) == pytest.approx(curve.least_loss)
    assert found.laws["parameters"].exponent == pytest.approx(0.6)
    assert found.laws["tokens"].exponent == pytest.approx(0.4)
    assert found.laws["parameters"].at(1e21).value == pytest.approx(1e8 * 1000**0.6)


def test_budgets_that_no_one_names_are_found() -> None:
    generator = np.random.default_rng(0)
    runs = [replace(run, flops=run.flops * float(generator.uniform(0.95, 1.05))) for run in Truth().runs(0, generator)]
    stray = replace(runs[0], flops=1.1e19)
    found = by_budget([replace(run, budget=None) for run in [*runs, stray]])
    assert list(found) == pytest.approx(list(Truth().budgets), rel=0.03)
    assert all(len(of_budget) == Truth().sizes for of_budget in found.values())


def test_a_run_without_a_budget_is_on_no_curve_where_others_name_theirs() -> None:
    runs = Truth().runs(0, np.random.default_rng(0))
    found = by_budget([replace(runs[0], budget=None), *runs[1:]])
    assert sum(len(of_budget) for of_budget in found.values()) == len(runs) - 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda runs: runs[:4], "too few runs for a curve (4); add runs until there are 5"),
        (lambda runs: [replace(run, parameters=1e8) for run in runs], "too few different sizes for a curve (1)"),
        (lambda runs: [replace(run, loss=5 - run.loss) for run in runs], "its losses have no minimum over parameters"),
        (
            lambda runs: [replace(run, loss=3 - 0.1 * i + 0.004 * i**2) for i, run in enumerate(runs)],
            "its least loss lies outside of its parameters; add runs with larger models",
        ),
        (
            lambda runs: [replace(run, loss=3 + 0.1 * i + 0.004 * i**2) for i, run in enumerate(runs)],
            "its least loss lies outside of its parameters; add runs with smaller models",
        ),
    ],
)
def test_a_budget_without_an_optimum_is_left_out_with_the_reason(change, reason: str) -> None:
    runs = parabolas(OPTIMA)
    of_first, others = runs[:7], runs[7:]
    found = fit([*change(of_first), *others])
    assert [curve.budget for curve in found.curves] == [1e19, 1e20, 1e21]
    assert len(found.left_out) == 1 and f"budget 1e+18 FLOPs: {reason}" in found.left_out[0]
    assert found.laws["parameters"].exponent == pytest.approx(0.5, abs=1e-6)


def test_a_curve_that_is_flat_within_the_noise_is_left_out() -> None:
    noise = np.random.default_rng(0)
    runs = [replace(run, loss=run.loss * float(np.exp(0.01 * noise.standard_normal()))) for run in parabolas(OPTIMA)]
    flat = [replace(run, loss=2.7 + 0.05 * (run.loss - 2.7)) for run in runs[:7]]
    found = fit([*flat, *runs[7:]])
    assert len(found.left_out) == 1 and "budget 1e+18 FLOPs: its optimum is uncertain" in found.left_out[0]
    assert [curve.budget for curve in found.curves] == [1e19, 1e20, 1e21]


def test_two_budgets_give_no_power_law() -> None:
    found = fit(parabolas({1e18: 1e8, 1e19: 3e8}))
    assert found.laws == {} and len(found.curves) == 2
    assert "too few budgets with an optimum for N(C) and D(C) (2); add budgets until there are 3" in found.left_out[0]
