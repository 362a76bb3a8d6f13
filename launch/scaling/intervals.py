"""A figure with its interval, from what the same fit says of resampled runs."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# Of the intervals: the share of draws in them.
LEVEL = 0.95
# Below this share of draws that have a value an interval would speak of the others alone.
LEAST_SHARE = 0.8


class Interval(NamedTuple):
    """A figure and the interval that LEVEL of the draws lie in; the ends are not a number where too few draws have a
    value."""

    value: float
    low: float
    high: float

    def __contains__(self, truth: object) -> bool:
        return isinstance(truth, int | float) and self.low <= truth <= self.high

    def written(self, places: str = ".4g") -> str:
        """For a reader: value [low, high]."""
        ends = "no interval" if math.isnan(self.low) else f"{self.low:{places}}, {self.high:{places}}"
        return f"{self.value:{places}} [{ends}]"


def interval(value: float, draws: np.ndarray) -> Interval:
    """Percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3).

    `draws`: the figure of each resample, not a number where that has none.
    """
    finite = draws[np.isfinite(draws)]
    if len(finite) < max(2.0, LEAST_SHARE * len(draws)):
        return Interval(float(value), math.nan, math.nan)
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))
