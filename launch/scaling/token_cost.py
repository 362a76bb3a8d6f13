"""What a token of training costs as a function of the size, learned from the runs that were made.

A token does not cost 6 N where contexts are long or embeddings large (-29 to +108 % for the runs of arXiv 2510.02228),
and the optimum of a budget depends on it. The table of runs has exact FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launch.scaling.runs import ScalingRun

# Powers of N. With widths and depths in proportion N grows as width^3; attention and cells as width^2 (their widths
# and the number of layers), embedding and head as width.
_POWERS = (1.0, 2 / 3, 1 / 3)
# In parameters: no optimum is looked for among larger models.
LARGEST = 1e14


@dataclass(frozen=True)
class TokenCost:
    """FLOPs of a token, c(N) = sum of factors[i] N^(1, 2/3, 1/3).

    Attributes:
        factors: of the powers; trailing zeros where the runs have too few sizes.
        smallest: size down to which it holds: a tenth of that of the smallest run.
        error: greatest deviation of a run from it, as a share.
    """

    factors: tuple[float, ...]
    smallest: float
    error: float

    def flops(self, parameters: np.ndarray) -> np.ndarray:
        """FLOPs of one token of training, of models of so many parameters."""
        return sum(
            (factor * parameters**power for factor, power in zip(self.factors, _POWERS, strict=True)),
            start=np.zeros_like(parameters),
        )


def fit_cost(runs: Sequence[ScalingRun]) -> TokenCost:
    """Least squares of relative deviations. As many powers as there are sizes; fewer where a cost would not be
    positive, or would not grow with the size, somewhere from a tenth of the smallest size to LARGEST."""
    sizes = np.array([run.parameters for run in runs])
    costs = np.array([run.flops / run.tokens for run in runs])
    smallest = float(sizes.min()) / 10
    reach = np.geomspace(smallest, LARGEST, 400)
    found = None
    for terms in range(min(len(_POWERS), len(set(sizes.tolist()))), 0, -1):
        powers = np.stack([sizes**power for power in _POWERS[:terms]], axis=-1) / costs[:, None]
        # Columns differ by orders of magnitude.
        scale = powers.max(axis=0)
        factors = np.linalg.lstsq(powers / scale, np.ones_like(costs), rcond=None)[0] / scale
        found = TokenCost(tuple(float(factor) for factor in factors) + (0.0,) * (len(_POWERS) - terms), smallest, 0.0)
        if (np.diff(found.flops(reach), prepend=0) > 0).all():
            break
    assert found is not None, "there are no runs"
    error = float(np.abs(found.flops(sizes) / costs - 1).max())
    return TokenCost(found.factors, smallest, error)
