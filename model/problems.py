"""What is wrong with a setting, in words. Each function calls `problem(key, text)` where something is."""

from __future__ import annotations

import math
from collections.abc import Callable

Problem = Callable[[str, str], None]
# Of anything that kernels index with 32 bits.
LARGEST_WIDTH = 2**31 - 1
# Beyond all that is trained, and few enough to be listed one by one.
MOST_BLOCKS = 100_000


def check_choice(problem: Problem, key: str, value: str, choices: tuple[str, ...]) -> None:
    """`value` must be one of `choices`."""
    if value not in choices:
        problem(key, f"unknown value '{value}'; choose one of {', '.join(choices)}")


def check_positive(problem: Problem, key: str, value: float) -> None:
    """`value` must be positive and finite."""
    if not 0 < value < math.inf:
        problem(key, f"is {value}; it must be a positive number")


def check_size(problem: Problem, key: str, value: int, limit: int) -> None:
    """`value`, which counts something that is made, must be positive, and no more than a machine could ever hold."""
    check_positive(problem, key, value)
    if limit < value < math.inf:
        problem(key, f"is {value}; it must be at most {limit}")


def check_factor(problem: Problem, key: str, factor: float) -> bool:
    """`factor`, times a width, must give a number; returns whether it does."""
    if not -LARGEST_WIDTH < factor < LARGEST_WIDTH:
        problem(key, f"is {factor}; it must be a number that gives a width of at most {LARGEST_WIDTH}")
        return False
    return True


def check_soft_cap(problem: Problem, key: str, value: float | None) -> None:
    """`value` must be positive, or None for no cap."""
    if value is not None and not 0 < value < math.inf:
        problem(key, f"is {value}; a soft cap must be positive, use null for none")


def check_heads(problem: Problem, n_heads: int, width: int, origin: str) -> bool:
    """`n_heads` must divide `width`, which `origin` explains; returns whether it does."""
    if n_heads < 1 or width % n_heads:
        problem("n_heads", f"{n_heads} heads do not divide the width {width} ({origin}); choose a divisor of {width}")
        return False
    return True


def check_convolution(problem: Problem, kernel_size: int) -> None:
    """A convolution over time must look back; 0: there is none."""
    if kernel_size < 2 and kernel_size != 0:
        problem("conv_kernel_size", f"is {kernel_size}; a convolution over time needs at least 2 taps, 0 is none")
