"""Runs with a known law, and how often fits to them contain it: `python -m tests.launch.recovery [DRAWS]`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from launch.scaling.isoflop import fit_isoflop
from launch.scaling.parametric import fit_law, loss
from launch.scaling.runs import ScalingRun


@dataclass(frozen=True)
class Truth:
    """A law and a plan of runs with C = 6 N D: budgets of sizes on both sides of each optimum."""

    # As arXiv 2404.10102 found them for Chinchilla's runs.
    e: float = 1.82
    a: float = 482.0
    b: float = 2085.0
    alpha: float = 0.348
    beta: float = 0.366
    gamma: float = 1.0
    budgets: tuple[float, ...] = (6e18, 2e19, 6e19, 2e20, 6e20)
    sizes: int = 9
    # From the smallest size of a budget to its optimum, as a factor.
    span: float = 4.0

    @property
    def coefficients(self) -> np.ndarray:
        return np.array([self.e, np.log(self.a), np.log(self.b), self.alpha, self.beta, self.gamma])

    @property
    def size_exponent(self) -> float:
        return self.beta / (self.alpha + self.beta)

    def optimal_size(self, flops: float) -> float:
        """N(C) = G (C / 6)^a, G = (alpha A / (beta B))^(1 / (alpha + beta)) (arXiv 2203.15556, equation 4)."""
        ratio = self.alpha * self.a / (self.beta * self.b)
        return ratio ** (1 / (self.alpha + self.beta)) * (flops / 6) ** self.size_exponent

    def runs(self, noise: float, generator: np.random.Generator, family: str = "truth") -> list[ScalingRun]:
        """The runs of the plan; losses are off by a share of `noise`, one standard deviation."""
        found = []
        for budget in self.budgets:
            around = np.exp(np.linspace(-np.log(self.span), np.log(self.span), self.sizes))
            for size in self.optimal_size(budget) * around:
                tokens = budget / (6 * size)
                exact = float(loss(self.coefficients, np.array(size), np.array(tokens)))
                measured = exact * float(np.exp(noise * generator.standard_normal()))
                name = f"{family}-{len(found):03d}"
                found.append(ScalingRun(name, family, float(size), float(tokens), budget, None, measured, budget))
        return found


def law_is_recovered(truth: Truth, draw: int, resamples: int, starts: int, noise: float = 0.005) -> dict[str, bool]:
    """Of one draw of the noise: which figures of the fit have the truth in their interval."""
    generator = np.random.default_rng(draw)
    law = fit_law(truth.runs(noise, generator), truth.gamma != 1, resamples, generator, starts)
    true = dict(zip(("E", "ln A", "ln B", "alpha", "beta", "gamma"), map(float, truth.coefficients), strict=True))
    true |= {"a": truth.size_exponent, "b": 1 - truth.size_exponent}
    return {name: true[name] in found for name, found in law.figures().items()}


def isoflop_is_recovered(truth: Truth, draw: int, noise: float = 0.005) -> dict[str, bool]:
    """The same of the exponents of IsoFLOP curves, and of the optimal size in the middle of the budgets."""
    generator = np.random.default_rng(draw)
    laws = fit_isoflop(truth.runs(noise, generator), 1000, generator).laws
    middle = truth.budgets[len(truth.budgets) // 2]
    return {
        "N(C) exponent": truth.size_exponent in laws["parameters"].exponent_interval(),
        "D(C) exponent": 1 - truth.size_exponent in laws["tokens"].exponent_interval(),
        "N(C)": truth.optimal_size(middle) in laws["parameters"].at(middle),
    }


# With the exponents divided by gamma the losses are much as with gamma 1.
WITH_GAMMA = Truth(a=482.0 ** (1 / 0.7), b=2085.0 ** (1 / 0.7), alpha=0.348 / 0.7, beta=0.366 / 0.7, gamma=0.7)


def main(draws: int) -> None:
    """Print how many draws recover each figure, and all of them at once."""
    protocols: dict[str, Callable[[int], dict[str, bool]]] = {
        "IsoFLOP": lambda draw: isoflop_is_recovered(Truth(), draw),
        "L(N, D)": lambda draw: law_is_recovered(Truth(), draw, resamples=200, starts=32),
        "L(N, D) with gamma": lambda draw: law_is_recovered(WITH_GAMMA, draw, resamples=200, starts=32),
    }
    for name, recovered in protocols.items():
        found = [recovered(draw) for draw in range(draws)]
        counts = {figure: sum(one[figure] for one in found) for figure in found[0]}
        print(f"{name}: of {draws} draws {counts}, all at once {sum(all(one.values()) for one in found)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
