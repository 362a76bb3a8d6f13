"""A figure with its interval, from what the same fit says of resampled runs."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, stdtrit

# Of the intervals.
LEVEL = 0.95
# Below this share of draws that have a value an interval would speak of the others alone.
LEAST_SHARE = 0.8


class Interval(NamedTuple):
    """A figure and its interval at LEVEL; the ends are not a number where too few draws have a value."""

    value: float
    low: float
    high: float

    def __contains__(self, truth: object) -> bool:
        return isinstance(truth, int | float) and self.low <= truth <= self.high

    def written(self, places: str = ".4g") -> str:
        """For a reader: value [low, high]."""
        ends = "no interval" if math.isnan(self.low) else f"{self.low:{places}}, {self.high:{places}}"
        return f"{self.value:{places}} [{ends}]"


def tail_of_resampled_runs(runs: int, coefficients: int) -> float:
    """Share of the draws to leave out at each end when `runs` runs, to which `coefficients` were fitted, are resampled.

    Resamples of few runs scatter less than runs would: the expanded percentile interval (Hesterberg, What Teachers
    Should Know About the Bootstrap, arXiv 1411.5279) takes further percentiles, as Student's t does. It is given there
    for a mean, one coefficient.
    """
    left = runs - coefficients
    return float(ndtr(-np.sqrt(runs / left) * stdtrit(left, (1 + LEVEL) / 2)))


def interval(value: float, draws: np.ndarray, tail: float = (1 - LEVEL) / 2) -> Interval:
    """Percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3).

    Args:
        draws: the figure of each resample, not a number where that has none.
        tail: share of the draws that lie below the interval, and above it.
    """
    finite = draws[np.isfinite(draws)]
    if len(finite) < max(2.0, LEAST_SHARE * len(draws)):
        return Interval(float(value), math.nan, math.nan)
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))
