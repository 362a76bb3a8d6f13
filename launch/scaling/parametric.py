"""L(N, D) = E + (A N^-alpha + B D^-beta)^gamma, fitted to runs of one family (arXiv 2203.15556, section 3.3).

gamma is 1 in that paper and free in arXiv 2510.02228. The fit minimises the Huber loss of the difference of log losses,
with L-BFGS from many starts, and repeats that for resampled runs, which gives the intervals.

How far L-BFGS goes decides about the intervals. scipy stops where a step gains less than `ftol` of max(|objective|, 1),
1e-9 by default; this objective is about 1e-3, so whole fits and all their resamples end near their starts, with
intervals ten times too narrow (arXiv 2404.10102, section 4.1). Here the objective is scaled to the order of 1.

Axes: R resamples, N runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from launch.scaling.intervals import Interval, interval, tail_of_resampled_runs
from launch.scaling.runs import ScalingRun

# Difference of log losses beyond which the Huber loss grows linearly (arXiv 2203.15556, section 3.3).
HUBER_DELTA = 1e-3
# Order of the columns of coefficients everywhere in this package.
COEFFICIENTS = ("E", "ln A", "ln B", "alpha", "beta", "gamma")
_STARTS = 32
# L-BFGS, of an objective of the order of 1.
_TOLERANCES = {"ftol": 1e-12, "gtol": 1e-7, "maxiter": 5000, "maxfun": 20000, "maxcor": 20}
# (least, most) of ln E, both terms' logarithms, both exponents times gamma, ln gamma. No run is near them: they keep a
# resample that determines a coefficient badly from running away to infinity.
_BOUNDS = [(np.log(1e-4), None), (None, None), (None, None), (1e-3, 5.0), (1e-3, 5.0), (-3.0, 3.0)]
# Starts that come as near to the best objective as this have found the same fit.
_SAME = 1e-6


@dataclass(frozen=True)
class LossLaw:
    """Coefficients of one fit, and of every resample.

    Attributes:
        coefficients: [6], in the order of COEFFICIENTS; losses in nats per token, N in parameters, D in tokens.
        draws: [R, 6], the same of each resample.
        free_gamma: whether gamma was fitted; it is 1 otherwise.
        runs: how many were fitted.
        starts: how many of the starts ended at this fit, of how many.
        residuals: [N], fitted log loss less measured log loss, in the order of the runs.
    """

    coefficients: np.ndarray
    draws: np.ndarray
    free_gamma: bool
    runs: int
    starts: tuple[int, int]
    residuals: np.ndarray

    @property
    def name(self) -> str:
        return "L(N, D) with gamma" if self.free_gamma else "L(N, D)"

    @property
    def tail(self) -> float:
        """Share of the draws that lie below an interval, and above it."""
        return tail_of_resampled_runs(self.runs, len(COEFFICIENTS) if self.free_gamma else len(COEFFICIENTS) - 1)

    def interval(self, value: float, draws: np.ndarray) -> Interval:
        """The interval of what the fit says, from what its resamples say of it."""
        return interval(float(value), draws, self.tail)

    def figures(self) -> dict[str, Interval]:
        """Coefficients, and the exponents a and b of the optimum N ~ C^a, D ~ C^b where C ~ N D.

        a = beta / (alpha + beta), b = alpha / (alpha + beta) (arXiv 2203.15556, equation 4), whatever gamma is.
        """
        named = dict(zip(COEFFICIENTS, range(len(COEFFICIENTS)), strict=True))
        if not self.free_gamma:
            del named["gamma"]
        found = {name: self.interval(self.coefficients[place], self.draws[:, place]) for name, place in named.items()}
        a, draws = float(_size_exponent(self.coefficients)), _size_exponent(self.draws)
        return found | {"a": self.interval(a, draws), "b": self.interval(1 - a, 1 - draws)}

    def warnings(self) -> list[str]:
        """What the runs leave open, as sentences."""
        figures = self.figures()
        found = []
        if figures["E"].low < 0.05 * figures["E"].value:
            found.append(f"{self.name}: the runs do not tell E from 0; longer runs of larger models would")
        if self.free_gamma and figures["gamma"].high > 4 * figures["gamma"].low:
            found.append(
                f"{self.name}: the runs hardly determine gamma ({figures['gamma'].written('.2g')}), nor alpha and beta "
                "apart from it; compare a, b and predictions, which do not depend on it"
            )
        if self.starts[0] < 3:
            found.append(f"{self.name}: only {self.starts[0]} of {self.starts[1]} starts found this fit; doubt it")
        return found


def loss(coefficients: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """L(N, D) in nats per token. `coefficients` [..., 6] goes with the other shapes as numpy broadcasts [...]."""
    e, log_a, log_b, alpha, beta, gamma = np.moveaxis(np.asarray(coefficients, dtype=float), -1, 0)
    size = log_a - alpha * np.log(parameters)
    data = log_b - beta * np.log(tokens)
    found: np.ndarray = e + np.exp(gamma * np.logaddexp(size, data))
    return found


def too_few(runs: Sequence[ScalingRun], free_gamma: bool) -> str | None:
    """Why L(N, D) cannot be fitted to these runs, with what to add; None where it can."""
    needed = 2 * (6 if free_gamma else 5)
    if len(runs) < needed:
        return f"too few runs for {needed // 2} coefficients ({len(runs)}); add runs until there are {needed}"
    different = {"sizes": {run.parameters for run in runs}, "numbers of tokens": {run.tokens for run in runs}}
    for noun, values in different.items():
        if len(values) < 4:
            return f"too few different {noun} for an exponent ({len(values)}); add runs until there are 4"
    return None


def fit_law(
    runs: Sequence[ScalingRun], free_gamma: bool, resamples: int, generator: np.random.Generator, starts: int = _STARTS
) -> LossLaw:
    """Fit L(N, D) to runs that are enough (`too_few`).

    Args:
        free_gamma: fit gamma too.
        resamples: R, of the runs with replacement, for the intervals.
        generator: of starts and resamples; the same gives the same fit.
        starts: points from which L-BFGS goes, for the runs themselves.
    """
    problem = _Problem(runs, free_gamma)
    every = np.ones(len(runs))
    ends = [problem.minimise(problem.start(generator), every) for _ in range(starts)]
    best, value = min(ends, key=lambda end: end[1])
    draws = []
    for _ in range(resamples):
        counts = np.bincount(generator.integers(len(runs), size=len(runs)), minlength=len(runs)).astype(float)
        # From the fit to all runs, and from afar: a resample may have its optimum elsewhere.
        found = [problem.minimise(start, counts) for start in (best, problem.start(generator))]
        draws.append(problem.coefficients(min(found, key=lambda end: end[1])[0]))
    return LossLaw(
        coefficients=problem.coefficients(best),
        draws=np.array(draws).reshape(resamples, len(COEFFICIENTS)),
        free_gamma=free_gamma,
        runs=len(runs),
        starts=(sum(end[1] <= value * (1 + _SAME) for end in ends), starts),
        residuals=problem.log_losses(best)[0] - problem.log_loss,
    )


class _Problem:
    """The objective in the coordinates in which L-BFGS walks.

    Logarithms of N and D are centred and the exponents multiplied by gamma: then a term and its exponent, and gamma and
    both exponents, can be changed one without the other, and a fit takes tens of steps in place of thousands.

    A point is (ln E, size term and data term to the power gamma at the centre as logarithms, alpha gamma, beta gamma,
    ln gamma); without the last where gamma is 1.
    """

    def __init__(self, runs: Sequence[ScalingRun], free_gamma: bool):
        log_size, log_tokens = (np.log([getattr(run, name) for run in runs]) for name in ("parameters", "tokens"))
        self.log_loss = np.log([run.loss for run in runs])
        self._centre = log_size.mean(), log_tokens.mean()
        self._size, self._tokens = log_size - self._centre[0], log_tokens - self._centre[1]
        self._free_gamma = free_gamma

    def start(self, generator: np.random.Generator) -> np.ndarray:
        """A point at random: what is reducible of the median loss split between both terms, exponents as published
        ones are."""
        irreducible = generator.uniform(0.1, 0.95) * np.exp(self.log_loss.min())
        reducible = np.exp(np.median(self.log_loss)) - irreducible
        share = generator.uniform(0.15, 0.85)
        point = [np.log(irreducible), np.log(share * reducible), np.log((1 - share) * reducible)]
        point += list(generator.uniform(0.1, 0.8, size=2))
        return np.array(point + [generator.uniform(-0.7, 0.7)] * self._free_gamma)

    def minimise(self, start: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, float]:
        """(point, objective) at which L-BFGS ends. `counts` [N]: how often each run counts."""
        ended = minimize(
            self._objective,
            start,
            args=(counts,),
            jac=True,
            method="L-BFGS-B",
            bounds=_BOUNDS[: len(start)],
            options=_TOLERANCES,
        )
        return ended.x, float(ended.fun)

    def log_losses(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ln L [N], its derivatives [points, N])."""
        e, a, b, alpha, beta = point[:5]
        gamma = np.exp(point[5]) if self._free_gamma else 1.0
        size, data = (a - alpha * self._size) / gamma, (b - beta * self._tokens) / gamma
        inner = np.logaddexp(size, data)
        fitted = np.logaddexp(e, gamma * inner)
        of_e, of_size = np.exp(e - fitted), np.exp(size - inner)
        by_size, by_data = (1 - of_e) * of_size, (1 - of_e) * (1 - of_size)
        derivatives = [of_e, by_size, by_data, -by_size * self._size, -by_data * self._tokens]
        if self._free_gamma:
            derivatives.append(gamma * ((1 - of_e) * inner - by_size * size - by_data * data))
        return fitted, np.array(derivatives)

    def coefficients(self, point: np.ndarray) -> np.ndarray:
        """[6], in the order of COEFFICIENTS."""
        e, a, b, alpha, beta = point[:5]
        gamma = np.exp(point[5]) if self._free_gamma else 1.0
        alpha, beta = alpha / gamma, beta / gamma
        log_a, log_b = a / gamma + alpha * self._centre[0], b / gamma + beta * self._centre[1]
        return np.array([np.exp(e), log_a, log_b, alpha, beta, gamma])

    def _objective(self, point: np.ndarray, counts: np.ndarray) -> tuple[float, np.ndarray]:
        fitted, derivatives = self.log_losses(point)
        residual = fitted - self.log_loss
        clipped = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
        # Huber: r^2 / 2 within delta, delta (|r| - delta / 2) beyond; both are clipped * (r - clipped / 2).
        scaled = counts / (counts.sum() * HUBER_DELTA**2)
        return float(scaled @ (clipped * (residual - clipped / 2))), derivatives @ (scaled * clipped)


def _size_exponent(coefficients: np.ndarray) -> np.ndarray:
    alpha, beta = coefficients[..., 3], coefficients[..., 4]
    found: np.ndarray = beta / (alpha + beta)
    return found
