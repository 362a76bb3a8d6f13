"""The size and the tokens that a budget is best spent on, by every fit of a group.

Axes: R resamples, B budgets, G sizes of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launch.scaling.intervals import Interval
from launch.scaling.isoflop import Axis, PowerLaw
from launch.scaling.parametric import LossLaw, loss
from launch.scaling.runs import Group
from launch.scaling.token_cost import LARGEST, TokenCost

# Sizes that are looked at; the optimum lies between two of them to a fraction of their distance.
_GRID = 401


@dataclass(frozen=True)
class GroupModel:
    """What predictions for one group need.

    Attributes:
        most_flops: of a run that was fitted.
        power_laws: N(C) and D(C) of the IsoFLOP curves; empty where there are none.
        loss_laws: the fits of L(N, D).
    """

    group: Group
    most_flops: float
    power_laws: dict[Axis, PowerLaw]
    loss_laws: list[LossLaw]
    cost: TokenCost

    @property
    def preferred_law(self) -> LossLaw | None:
        """The law with gamma where it was fitted: it is the other one where gamma is 1."""
        return max(self.loss_laws, key=lambda law: law.free_gamma, default=None)


@dataclass(frozen=True)
class Prediction:
    """By one fit, for one budget.

    Attributes:
        fit: its name.
        parameters: N.
        tokens: D.
        loss: nats per token; None where the fit says nothing of it.
    """

    fit: str
    parameters: Interval
    tokens: Interval
    loss: Interval | None


def predict(model: GroupModel, flops: float) -> list[Prediction]:
    """What each fit says for a budget of `flops` (training FLOPs, positive)."""
    found = []
    if model.power_laws:
        by_axis = {axis: law.at(flops) for axis, law in model.power_laws.items()}
        found.append(Prediction("IsoFLOP", by_axis["parameters"], by_axis["tokens"], None))
    for law in model.loss_laws:
        value, draws = (
            optimum(coefficients, model.cost, np.array([flops])) for coefficients in (law.coefficients[None], law.draws)
        )
        parameters, tokens, losses = (
            law.interval(at[0, 0], drawn[:, 0]) for at, drawn in zip(value, draws, strict=True)
        )
        found.append(Prediction(law.name, parameters, tokens, losses))
    return found


def optimum(coefficients: np.ndarray, cost: TokenCost, flops: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, D, L), each [R, B]: the least L(N, C / c(N)), with what a token really costs in place of C = 6 N D.

    Args:
        coefficients: [R, 6].
        flops: [B] budgets.

    Not a number where the optimum lies beyond the sizes for which the cost of a token is known.
    """
    grid = np.geomspace(cost.smallest, LARGEST, _GRID)
    tokens = flops[:, None] / cost.flops(grid)
    sizes = np.empty((len(coefficients), len(flops)))
    is_known = np.empty(sizes.shape, dtype=bool)
    for place in range(len(flops)):
        # [R, G]; one budget at a time keeps this small.
        losses = loss(coefficients[:, None], grid, tokens[place])
        found = losses.argmin(axis=1)
        lowest = np.clip(found, 1, _GRID - 2)
        rows = np.arange(len(coefficients))
        before, at, behind = (losses[rows, lowest + step] for step in (-1, 0, 1))
        # The minimum of the parabola through three neighbours, in steps of the grid.
        curvature = np.maximum(before - 2 * at + behind, np.finfo(float).tiny)
        shift = np.clip((before - behind) / (2 * curvature), -1, 1)
        sizes[:, place] = grid[lowest] * (grid[1] / grid[0]) ** shift
        is_known[:, place] = found == lowest
    spent = flops / cost.flops(sizes)
    losses = loss(coefficients[:, None], sizes, spent)
    of_sizes, of_tokens, of_losses = (np.where(is_known, values, np.nan) for values in (sizes, spent, losses))
    return of_sizes, of_tokens, of_losses


def flops_for_loss(losses: np.ndarray, flops: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[R] budgets at which each falling curve of optimal losses [R, B] over `flops` [B] reaches `wanted` [R]; not a
    number beyond its ends."""
    grid = np.log(flops)
    found = [
        np.interp(-loss_wanted, -curve, grid, left=math.nan, right=math.nan)
        for curve, loss_wanted in zip(losses, wanted, strict=True)
    ]
    return np.exp(np.array(found))


def as_lines(models: Sequence[GroupModel], flops: float) -> list[str]:
    """Predictions of every group for a reader."""
    lines = [f"Best use of {flops:.4g} training FLOPs; in brackets the 95 % intervals"]
    for model in models:
        lines += ["", str(model.group)]
        beyond = flops / model.most_flops
        if beyond > 1.5:
            lines.append(
                f"  extrapolated: {beyond:.1f} times the largest run; intervals know nothing of what changes there"
            )
        for found in predict(model, flops):
            figures = [f"parameters {found.parameters.written('.3g')}", f"tokens {found.tokens.written('.3g')}"]
            figures += [] if found.loss is None else [f"loss {found.loss.written('.4f')}"]
            lines.append(f"  {found.fit:20} {'   '.join(figures)}")
        if not model.power_laws and not model.loss_laws:
            lines.append("  no fit: too few runs (the page of the fit says what is missing)")
    return lines
