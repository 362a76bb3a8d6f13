"""ListOps: the value of nested operations on lists of digits. Source: arXiv 1804.06028; in the Long Range Arena."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.tasks.base import Example, Problem, Task
from data_pipeline.tasks.draws import Draws
from data_pipeline.tasks.state_tracking import check_size

OPERATORS = ("[MAX", "[MIN", "[MED", "[SM")
CLOSE = "]"
DIGITS = tuple("0123456789")
# An operation, two arguments, and its end.
_SMALLEST = 4


@dataclass(frozen=True)
class Lists:
    """Of ListOps."""

    # Operations inside of each other.
    depth: int = 10
    # Arguments of one operation, at most.
    arguments: int = 10


class ListOperations(Task[Lists]):
    """One operation on digits and further operations: the largest, the smallest, the median, the sum modulo 10.

    The median of an even number of arguments is the mean of the middle two, rounded down.
    """

    name = "listops"
    settings_class = Lists

    def validate(self, settings: Lists, problem: Problem) -> None:
        check_size(problem, "depth", settings.depth, 1, 100)
        check_size(problem, "arguments", settings.arguments, 2)

    def vocabulary(self, settings: Lists) -> list[str]:
        return [*DIGITS, *OPERATORS, CLOSE]

    def answers(self, settings: Lists) -> int:
        return len(DIGITS)

    def shortest(self, settings: Lists) -> int:
        return _SMALLEST

    def example(self, draws: Draws, length: int, settings: Lists) -> Example:
        words: list[str] = []
        value = _operation(draws, length, settings, settings.depth, words)
        return Example(words, [*([None] * (len(words) - 1)), str(value)])


def _operation(draws: Draws, budget: int, settings: Lists, depth: int, words: list[str]) -> int:
    """Append an operation of at most `budget` words to `words`; returns its value."""
    operator = OPERATORS[draws.one_below(len(OPERATORS))]
    words.append(operator)
    most = min(settings.arguments, budget - 2)
    count = 2 + draws.one_below(most - 1)
    # The words that are left are dealt out at random.
    cuts = sorted(draws.below(budget - 2 - count + 1, count - 1))
    shares = [1 + end - begin for begin, end in zip([0, *cuts], [*cuts, budget - 2 - count], strict=True)]
    values = []
    for share in shares:
        if depth > 1 and share >= _SMALLEST:
            values.append(_operation(draws, share, settings, depth - 1, words))
        else:
            values.append(draws.one_below(10))
            words.append(DIGITS[values[-1]])
    words.append(CLOSE)
    return operate(operator, values)


def operate(operator: str, values: list[int]) -> int:
    """The value of one operation."""
    if operator == "[MAX":
        return max(values)
    if operator == "[MIN":
        return min(values)
    if operator == "[SM":
        return sum(values) % 10
    middle = sorted(values)[(len(values) - 1) // 2 : len(values) // 2 + 1]
    return sum(middle) // len(middle)
