"""Families beside each other at equal compute: which has the lower loss at its optimum, and what the other would need.

Axes: R resamples, B budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from launch.scaling.fit import GroupFit
from launch.scaling.intervals import Interval, interval
from launch.scaling.isoflop import BUDGET_WIDTH, Curve
from launch.scaling.predict import GroupModel, flops_for_loss, optimum

# Curves of optimal losses are looked at so far around the budgets, as a factor, when equal losses are sought.
_REACH = 100.0


@dataclass(frozen=True)
class Comparison:
    """Two families with sequences of one length, at one budget that both have an IsoFLOP curve of.

    Attributes:
        budget: FLOPs.
        gap: loss of the first less that of the second, each at the lowest point of its curve, nats per token.
        fitted_gap: the same of the fits of L(N, D); None where one of the families has none.
        compute_ratio: share of the budget, or multiple of it, at which the second family has the loss that the first
            has with all of it, by the fits of L(N, D); None where one of the families has none.
    """

    first: str
    second: str
    context: int | None
    budget: float
    gap: Interval
    fitted_gap: Interval | None
    compute_ratio: Interval | None


def compare(fits: Sequence[GroupFit]) -> list[Comparison]:
    """Every pair of families at every budget and context that both have."""
    found = []
    for first, second in combinations(fits, 2):
        if first.group.context == second.group.context:
            found += _compare_pair(first, second)
    return found


def _compare_pair(first: GroupFit, second: GroupFit) -> list[Comparison]:
    pairs = [
        (one, other)
        for one in first.isoflop.curves
        for other in second.isoflop.curves
        if abs(np.log(one.budget / other.budget)) < np.log1p(BUDGET_WIDTH) / 2
    ]
    if not pairs:
        return []
    budgets = np.array([one.budget for one, _ in pairs])
    by_laws = _by_laws(first.model, second.model, budgets)
    return [
        Comparison(
            first=first.group.family,
            second=second.group.family,
            context=first.group.context,
            budget=one.budget,
            gap=_gap(one, other),
            fitted_gap=by_laws[place][0] if by_laws else None,
            compute_ratio=by_laws[place][1] if by_laws else None,
        )
        for place, (one, other) in enumerate(pairs)
    ]


def _gap(one: Curve, other: Curve) -> Interval:
    # The families' resamples are independent of each other.
    return interval(one.least_loss - other.least_loss, one.least_loss_draws - other.least_loss_draws)


def _by_laws(first: GroupModel, second: GroupModel, budgets: np.ndarray) -> list[tuple[Interval, Interval]]:
    """(gap, compute ratio) at each budget; empty where one of the groups has no fit of L(N, D)."""
    if first.preferred_law is None or second.preferred_law is None:
        return []
    # The one of fewer runs, which has the wider intervals.
    law = min(first.preferred_law, second.preferred_law, key=lambda law: law.tail)
    # The fit itself is row 0, its resamples follow.
    rows = [np.vstack([law.coefficients, law.draws]) for law in (first.preferred_law, second.preferred_law)]
    at_budget = [optimum(row, group.cost, budgets)[2] for row, group in zip(rows, (first, second), strict=True)]
    grid = np.geomspace(budgets.min() / _REACH, budgets.max() * _REACH, 61)
    curves = optimum(rows[1], second.cost, grid)[2]
    found = []
    for place, budget in enumerate(budgets):
        gaps = at_budget[0][:, place] - at_budget[1][:, place]
        ratios = flops_for_loss(curves, grid, at_budget[0][:, place]) / budget
        found.append((law.interval(gaps[0], gaps[1:]), law.interval(ratios[0], ratios[1:])))
    return found
