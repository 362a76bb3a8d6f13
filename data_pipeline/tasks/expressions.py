"""Expressions in brackets: their value, or the number that solves an equation. arXiv 2405.04517, appendix B.1."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.tasks.base import Example, Problem, Task, asked
from data_pipeline.tasks.draws import Draws
from data_pipeline.tasks.state_tracking import Modulus, check_size, numbers

UNKNOWN = "x"
QUESTION = "?"


@dataclass
class _Node:
    """A number, or an operation on two others. `number`: None for the unknown, of which there is one at most."""

    operator: str = ""
    left: _Node | None = None
    right: _Node | None = None
    number: int | None = 0

    def words(self) -> list[str]:
        if self.left is None or self.right is None:
            return [UNKNOWN if self.number is None else str(self.number)]
        return ["(", *self.left.words(), self.operator, *self.right.words(), ")"]

    def value(self, modulus: int) -> tuple[int, int]:
        """(a, b) of a x + b, modulo `modulus`, where x is the unknown."""
        if self.left is None or self.right is None:
            return (1, 0) if self.number is None else (0, self.number)
        (a, b), (c, d) = self.left.value(modulus), self.right.value(modulus)
        if self.operator == "*":
            # One of a and c is 0: the unknown occurs once.
            return (a * d + b * c) % modulus, b * d % modulus
        sign = 1 if self.operator == "+" else -1
        return (a + sign * c) % modulus, (b + sign * d) % modulus

    def keep_unknown(self, modulus: int) -> bool:
        """Make a sum of every product that would lose the unknown; returns whether the unknown is in here."""
        if self.left is None or self.right is None:
            return self.number is None
        there = [side.keep_unknown(modulus) for side in (self.left, self.right)]
        if any(there) and self.value(modulus)[0] == 0:
            self.operator = "+"
        return any(there)


def _random_tree(draws: Draws, operations: int, modulus: int) -> tuple[_Node, list[_Node]]:
    """An expression of so many operations, and its numbers from left to right; 4 * operations + 1 words."""
    root = _Node()
    waiting, leaves = [(root, operations)], []
    while waiting:
        node, count = waiting.pop()
        if count == 0:
            node.number = draws.one_below(modulus)
            leaves.append(node)
            continue
        on_the_left = draws.one_below(count)
        node.operator = "+-*"[draws.one_below(3)]
        node.left, node.right = _Node(), _Node()
        waiting += [(node.right, count - 1 - on_the_left), (node.left, on_the_left)]
    return root, leaves


class BracketedArithmetic(Task[Modulus]):
    """The value, modulo `modulus`, of an expression with +, - and * in which every operation has brackets."""

    name = "modular_arithmetic_brackets"
    settings_class = Modulus

    def validate(self, settings: Modulus, problem: Problem) -> None:
        check_size(problem, "modulus", settings.modulus, 2)

    def vocabulary(self, settings: Modulus) -> list[str]:
        return [*numbers(settings.modulus), "+", "-", "*", "(", ")", "="]

    def answers(self, settings: Modulus) -> int:
        return settings.modulus

    def shortest(self, settings: Modulus) -> int:
        return 2

    def example(self, draws: Draws, length: int, settings: Modulus) -> Example:
        tree, _ = _random_tree(draws, (length - 2) // 4, settings.modulus)
        return asked(tree.words(), [str(tree.value(settings.modulus)[1])])


class SolveEquation(Task[Modulus]):
    """The number that x stands for in `expression = number ?`, modulo a prime; there is exactly one."""

    name = "solve_equation"
    settings_class = Modulus

    def validate(self, settings: Modulus, problem: Problem) -> None:
        check_size(problem, "modulus", settings.modulus, 2)
        if settings.modulus > 1 and any(settings.modulus % d == 0 for d in range(2, int(settings.modulus**0.5) + 1)):
            problem("modulus", f"must be a prime, or some equations have no one solution ({settings.modulus})")

    def vocabulary(self, settings: Modulus) -> list[str]:
        return [*numbers(settings.modulus), "+", "-", "*", "(", ")", "=", UNKNOWN, QUESTION]

    def answers(self, settings: Modulus) -> int:
        return settings.modulus

    def shortest(self, settings: Modulus) -> int:
        return 4

    def example(self, draws: Draws, length: int, settings: Modulus) -> Example:
        modulus = settings.modulus
        tree, leaves = _random_tree(draws, (length - 4) // 4, modulus)
        unknown = leaves[draws.one_below(len(leaves))]
        solution, unknown.number = unknown.number, None
        assert solution is not None, "a number stands at every leaf"
        tree.keep_unknown(modulus)
        slope, rest = tree.value(modulus)
        words = [*tree.words(), "=", str((slope * solution + rest) % modulus), QUESTION]
        return Example(words, [*([None] * (len(words) - 1)), str(solution)])
