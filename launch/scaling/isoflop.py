"""IsoFLOP curves: at each budget a parabola in the logarithm of the size, and power laws through the optima.

Approach 2 of arXiv 2203.15556 (section 3.2): runs of one budget C differ in size, and the least loss among them shows
the size N(C) and the tokens D(C) that the budget is best spent on; N(C) = k C^a, D(C) = k C^b.

The parabola is that of the log loss: noise of losses is about a constant share of them, so the residuals of all budgets
can be put together, and the intervals come from resampling those (Davison and Hinkley, Bootstrap Methods and their
Application, section 6.2.3). Resampling runs, as for L(N, D), would leave some of a few runs out of a curve that needs
them all. A parabola is exact near the optimum only: sizes that are far from it, or all on one side, shift it.

Axes: R resamples, B budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from launch.scaling.intervals import Interval, interval
from launch.scaling.runs import ScalingRun

# Runs and different sizes of a curve: a parabola has three coefficients.
LEAST_RUNS = 5
LEAST_SIZES = 4
LEAST_BUDGETS = 3
# Runs whose FLOPs lie within this share of each other may be of one budget, where the table names no budgets.
BUDGET_WIDTH = 0.15
# Ends of the interval of an optimum that are further apart than this factor say nothing of where it lies.
WIDEST = 4.0
# A resample whose optimum lies so many times beyond the sizes has none.
_FARTHEST = 10.0

Axis = Literal["parameters", "tokens"]
AXES: tuple[Axis, ...] = ("parameters", "tokens")


@dataclass(frozen=True)
class Curve:
    """The runs of one budget and their parabolas.

    Attributes:
        budget: FLOPs as the table names it; where it does not, the geometric mean of the runs.
        flops: geometric mean of what the runs took, which the power laws are fitted to.
        runs: of this budget.
        optimal: by axis, the place of the least loss, in parameters or tokens.
        draws: by axis, [R] the same of each resample, not a number where the parabola has no minimum.
        least_loss: of the parabola in parameters, nats per token.
        least_loss_draws: [R].
        parabola: log loss by ln N: coefficients of 1, x, x^2 with x = ln N - centre, and the centre.
    """

    budget: float
    flops: float
    runs: list[ScalingRun]
    optimal: dict[Axis, float]
    draws: dict[Axis, np.ndarray]
    least_loss: float
    least_loss_draws: np.ndarray
    parabola: tuple[float, float, float, float]

    def optimum(self, axis: Axis) -> Interval:
        return interval(self.optimal[axis], self.draws[axis])

    def uncertain(self) -> str | None:
        """Why an optimum is not known well enough, with what to add; None where it is."""
        for axis in self.optimal:
            found = self.optimum(axis)
            if not found.high <= WIDEST * found.low:
                return f"its optimum is uncertain, {found.written('.2g')} {axis}; add runs"
        return None

    def losses(self, parameters: np.ndarray) -> np.ndarray:
        """The parabola at these sizes, in nats per token."""
        constant, slope, curvature, centre = self.parabola
        x = np.log(parameters) - centre
        found: np.ndarray = np.exp(constant + slope * x + curvature * x**2)
        return found


@dataclass(frozen=True)
class PowerLaw:
    """value = k C^exponent. `draws` [R, 2]: (ln k, exponent) of each resample, not a number where it has none."""

    log_factor: float
    exponent: float
    draws: np.ndarray

    def exponent_interval(self) -> Interval:
        return interval(self.exponent, self.draws[:, 1])

    def at(self, flops: float) -> Interval:
        """The value at a budget of `flops`."""
        x = np.log(flops)
        draws = np.exp(self.draws[:, 0] + self.draws[:, 1] * x)
        return interval(float(np.exp(self.log_factor + self.exponent * x)), draws)


@dataclass(frozen=True)
class IsoFlop:
    """Curves of one group, and the power laws through their optima; no laws where there are too few curves.

    Attributes:
        left_out: budgets without a usable curve, each with the reason.
    """

    curves: list[Curve]
    laws: dict[Axis, PowerLaw]
    left_out: list[str]


def by_budget(runs: Sequence[ScalingRun]) -> dict[float, list[ScalingRun]]:
    """Budget -> its runs, by FLOPs.

    Where any run names its budget, those that do not belong to none. Otherwise the runs are sorted by FLOPs, and the
    stretch of BUDGET_WIDTH that holds most of them is a budget, again and again until none holds LEAST_RUNS.
    """
    found: dict[float, list[ScalingRun]] = {}
    for run in runs:
        if run.budget is not None:
            found.setdefault(run.budget, []).append(run)
    if found:
        return dict(sorted(found.items()))
    left = sorted(runs, key=lambda run: run.flops)
    while left:
        flops = np.array([run.flops for run in left])
        ends = np.searchsorted(flops, flops * (1 + BUDGET_WIDTH), side="right")
        first = int(np.argmax(ends - np.arange(len(left))))
        stretch = left[first : ends[first]]
        if len(stretch) < LEAST_RUNS:
            break
        found[_mean([run.flops for run in stretch])] = stretch
        del left[first : ends[first]]
    return dict(sorted(found.items()))


def fit_isoflop(runs: Sequence[ScalingRun], resamples: int, generator: np.random.Generator) -> IsoFlop:
    """Parabolas of every budget of one group's runs, and N(C) and D(C) where LEAST_BUDGETS have one.

    Args:
        resamples: R, for the intervals.
        generator: of the resamples.
    """
    fits: list[_Fits] = []
    left_out = []
    for budget, of_budget in by_budget(runs).items():
        reason = _too_few(of_budget)
        if reason is None:
            found: _Fits = {axis: _Parabola(of_budget, axis) for axis in AXES}
            reason = next((why for axis, parabola in found.items() if (why := parabola.no_optimum(axis))), None)
        if reason is None:
            fits.append(found)
        else:
            left_out.append(f"budget {budget:.3g} FLOPs: {reason}")
    noise: dict[Axis, np.ndarray] = {}
    for axis in AXES:
        noise[axis] = _noise([found[axis] for found in fits])
    curves = []
    for found in fits:
        curve = _curve(found, noise, resamples, generator)
        if (reason := curve.uncertain()) is None:
            curves.append(curve)
        else:
            left_out.append(f"budget {curve.budget:.3g} FLOPs: {reason}")
    laws: dict[Axis, PowerLaw] = {}
    if len(curves) >= LEAST_BUDGETS:
        laws = {axis: _power_law(curves, axis) for axis in AXES}
    else:
        left_out.append(
            f"too few budgets with an optimum for N(C) and D(C) ({len(curves)}); add budgets until there are "
            f"{LEAST_BUDGETS}, of {LEAST_RUNS} runs or more each"
        )
    return IsoFlop(curves, laws, left_out)


class _Parabola:
    """Least squares of log loss by x = ln(axis) - centre."""

    def __init__(self, runs: list[ScalingRun], axis: Axis):
        self.runs = runs
        values = np.log([getattr(run, axis) for run in runs])
        self.centre = float(values.mean())
        self._ends = float(values.min()), float(values.max())
        x = values - self.centre
        powers = np.stack([np.ones_like(x), x, x**2], axis=-1)
        self._inverse = np.linalg.pinv(powers)
        log_loss = np.log([run.loss for run in runs])
        self.coefficients = self._inverse @ log_loss
        self._fitted = powers @ self.coefficients
        leverage = np.einsum("ni,in->n", powers, self._inverse)
        # A residual is smaller than the noise by what its run pulls the curve towards itself.
        self.residuals = (log_loss - self._fitted) / np.sqrt(np.maximum(1 - leverage, 1e-3))

    def no_optimum(self, axis: Axis) -> str | None:
        """Why the parabola shows no optimum, with what to add; None where it does."""
        place = _lowest(self.coefficients)[0] + self.centre
        if np.isnan(place):
            return f"its losses have no minimum over {axis}; add runs with other {axis}"
        if not self._ends[0] <= place <= self._ends[1]:
            more = "larger" if place > self._ends[1] else "smaller"
            what = f"{more} models" if axis == "parameters" else f"{'more' if more == 'larger' else 'fewer'} tokens"
            return f"its least loss lies outside of its {axis}; add runs with {what}"
        return None

    def resampled(self, noise: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
        """[R, 3] coefficients with noise drawn anew for every run."""
        drawn = noise[generator.integers(len(noise), size=(resamples, len(self.runs)))]
        found: np.ndarray = (self._fitted + drawn) @ self._inverse.T
        return found

    def optima(self, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(optimum on the axis, log loss there) for [..., 3] coefficients, not a number where there is none."""
        place, depth = _lowest(coefficients)
        place = place + self.centre
        reach = np.log(_FARTHEST)
        near = (place > self._ends[0] - reach) & (place < self._ends[1] + reach)
        return np.exp(np.where(near, place, np.nan)), np.where(near, depth, np.nan)


_Fits = dict[Axis, _Parabola]


def _curve(fits: _Fits, noise: dict[Axis, np.ndarray], resamples: int, generator: np.random.Generator) -> Curve:
    optimal: dict[Axis, float] = {}
    draws: dict[Axis, np.ndarray] = {}
    depths: dict[Axis, tuple[float, np.ndarray]] = {}
    for axis, parabola in fits.items():
        place, depth = parabola.optima(parabola.coefficients)
        draws[axis], drawn_depths = parabola.optima(parabola.resampled(noise[axis], resamples, generator))
        optimal[axis] = float(place)
        depths[axis] = float(np.exp(depth)), np.exp(drawn_depths)
    by_size = fits["parameters"]
    flops = _mean([run.flops for run in by_size.runs])
    budget = by_size.runs[0].budget
    constant, slope, curvature = map(float, by_size.coefficients)
    return Curve(
        budget=flops if budget is None else budget,
        flops=flops,
        runs=by_size.runs,
        optimal=optimal,
        draws=draws,
        least_loss=depths["parameters"][0],
        least_loss_draws=depths["parameters"][1],
        parabola=(constant, slope, curvature, by_size.centre),
    )


def _power_law(curves: Sequence[Curve], axis: Axis) -> PowerLaw:
    """Least squares of ln(optimum) by ln(FLOPs); a resample without an optimum at some budget takes the others."""
    x = np.log([curve.flops for curve in curves])
    values = np.log([curve.optimal[axis] for curve in curves])
    exponent, log_factor = np.polyfit(x, values, 1)
    drawn = np.log(np.stack([curve.draws[axis] for curve in curves], axis=1))
    there = np.isfinite(drawn)
    counts = there.sum(axis=1)
    enough = counts >= LEAST_BUDGETS
    weights, filled = there[enough].astype(float), np.where(there, drawn, 0.0)[enough]
    mean_x = weights @ x / counts[enough]
    mean_y = filled.sum(axis=1) / counts[enough]
    distance = weights * (x - mean_x[:, None])
    slopes = (distance * filled).sum(axis=1) / (distance**2).sum(axis=1)
    draws = np.full((len(drawn), 2), np.nan)
    draws[enough] = np.stack([mean_y - slopes * mean_x, slopes], axis=1)
    return PowerLaw(float(log_factor), float(exponent), draws)


def _lowest(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place, value), each [...], of the least c0 + c1 x + c2 x^2 [..., 3]; not a number where there is none."""
    constant, slope, curvature = np.moveaxis(coefficients, -1, 0)
    upwards = np.where(curvature > 0, curvature, np.nan)
    return -slope / (2 * upwards), constant - slope**2 / (4 * upwards)


def _noise(parabolas: Sequence[_Parabola]) -> np.ndarray:
    residuals = np.array([residual for parabola in parabolas for residual in parabola.residuals])
    centred: np.ndarray = residuals - residuals.mean() if len(residuals) else residuals
    return centred


def _too_few(runs: Sequence[ScalingRun]) -> str | None:
    if len(runs) < LEAST_RUNS:
        return f"too few runs for a curve ({len(runs)}); add runs until there are {LEAST_RUNS}"
    sizes = len({run.parameters for run in runs})
    if sizes < LEAST_SIZES:
        return f"too few different sizes for a curve ({sizes}); add sizes until there are {LEAST_SIZES}"
    return None


def _mean(values: Sequence[float]) -> float:
    return float(np.exp(np.log(values).mean()))
