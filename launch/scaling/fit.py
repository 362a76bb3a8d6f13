"""All that is fitted to a table of runs: for each family and context IsoFLOP curves and both forms of L(N, D)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from launch.scaling import parametric
from launch.scaling.isoflop import IsoFlop, fit_isoflop
from launch.scaling.parametric import LossLaw, fit_law
from launch.scaling.predict import GroupModel
from launch.scaling.runs import Group, RunTable, ScalingRun
from launch.scaling.token_cost import fit_cost

# Resamples for the parabolas: they cost nothing.
_LEAST_PARABOLA_RESAMPLES = 1000


@dataclass(frozen=True)
class FitSettings:
    """How tables are fitted."""

    # Resamples of the runs for the intervals of L(N, D); 1000 or more for the IsoFLOP curves.
    resamples: int = 200
    # Of starts and resamples: the same table and seed give the same figures.
    seed: int = 0

    def validate(self) -> None:
        """Raises ValueError where intervals would mean nothing."""
        if self.resamples < 20:
            raise ValueError(f"--resamples: too few for an interval ({self.resamples}); take 20 or more, such as 200")


@dataclass(frozen=True)
class GroupFit:
    """The fits of one group.

    Attributes:
        runs: that were fitted.
        not_fitted: what could not be fitted and why, and what the fits leave open.
    """

    group: Group
    runs: list[ScalingRun]
    isoflop: IsoFlop
    model: GroupModel
    not_fitted: list[str]


def fit_table(
    table: RunTable, settings: FitSettings, tell: Callable[[str], None] = lambda text: None
) -> list[GroupFit]:
    """Fit every group of the table.

    Args:
        tell: is given a line before each group.

    Raises ValueError where no group has enough runs for any fit: what each of them lacks.
    """
    settings.validate()
    fits = []
    for number, (group, runs) in enumerate(table.by_group().items()):
        tell(f"{group}: fitting {len(runs)} runs")
        fits.append(_fit_group(group, runs, settings, number))
    if not any(fit.model.power_laws or fit.model.loss_laws for fit in fits):
        lines = [f"  - {fit.group}: {reason}" for fit in fits for reason in fit.not_fitted]
        excluded = f"; {len(table.excluded)} runs of the table are excluded" if table.excluded else ""
        raise ValueError("\n".join([f"too few runs for any fit{excluded}:", *lines]))
    return fits


def _fit_group(group: Group, runs: list[ScalingRun], settings: FitSettings, number: int) -> GroupFit:
    # Of each fit by itself: a group that is added changes nothing of the others' draws.
    generators = [np.random.default_rng([settings.seed, number, fit]) for fit in range(3)]
    resamples = max(settings.resamples, _LEAST_PARABOLA_RESAMPLES)
    isoflop = fit_isoflop(runs, resamples, generators[0])
    not_fitted = [f"IsoFLOP: {reason}" for reason in isoflop.left_out]
    laws: list[LossLaw] = []
    for free_gamma in (False, True):
        if (reason := parametric.too_few(runs, free_gamma)) is not None:
            name = "L(N, D) with gamma" if free_gamma else "L(N, D)"
            not_fitted.append(f"{name}: {reason}")
            continue
        law = fit_law(runs, free_gamma, settings.resamples, generators[1 + free_gamma])
        laws.append(law)
        not_fitted += law.warnings()
    model = GroupModel(group, max(run.flops for run in runs), isoflop.laws, laws, fit_cost(runs))
    return GroupFit(group, runs, isoflop, model, not_fitted)
