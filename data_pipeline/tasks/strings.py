"""Formal languages whose answer is a string, or a symbol of one: arXiv 2405.04517, appendix B.1."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from data_pipeline.tasks.base import ASK, END, Example, Problem, Task, asked, symbols
from data_pipeline.tasks.draws import Draws
from data_pipeline.tasks.state_tracking import Alphabet, check_size

BETWEEN, GAP = ";", "_"
PUSH, POP = "push", "pop"


class StringTask(Task[Alphabet]):
    """A random string of symbols, and behind `=` another string that follows from it."""

    settings_class = Alphabet
    # Whether the answer ends with a word of its own.
    ends: ClassVar[bool] = False

    def validate(self, settings: Alphabet, problem: Problem) -> None:
        check_size(problem, "symbols", settings.symbols, 2)

    def vocabulary(self, settings: Alphabet) -> list[str]:
        return [*symbols(settings.symbols), ASK, *([END] if self.ends else [])]

    def answers(self, settings: Alphabet) -> int:
        return settings.symbols + self.ends

    def shortest(self, settings: Alphabet) -> int:
        return 2

    @abstractmethod
    def answer(self, string: Sequence[str], settings: Alphabet) -> list[str]:
        """What is to be written behind `string`, as long as it at most."""

    def example(self, draws: Draws, length: int, settings: Alphabet) -> Example:
        string = draws.choices(symbols(settings.symbols), self.string_length(length, settings))
        return asked(string, self.answer(string, settings))

    def string_length(self, length: int, settings: Alphabet) -> int:
        """Of the string, with which the example is at most `length`: ASK and all but the last of the answer follow."""
        return length // 2


class BucketSort(StringTask):
    """The symbols in the order of the alphabet."""

    name = "bucket_sort"

    def answer(self, string: Sequence[str], settings: Alphabet) -> list[str]:
        return sorted(string, key=symbols(settings.symbols).index)


class OddsFirst(StringTask):
    """The symbols at places 1, 3, 5, ..., then those at 2, 4, ..."""

    name = "odds_first"

    def answer(self, string: Sequence[str], settings: Alphabet) -> list[str]:
        return [*string[0::2], *string[1::2]]


class ReverseString(StringTask):
    """The symbols from last to first."""

    name = "reverse_string"

    def answer(self, string: Sequence[str], settings: Alphabet) -> list[str]:
        return list(string[::-1])


class Repetition(StringTask):
    """The string once more."""

    name = "repetition"

    def answer(self, string: Sequence[str], settings: Alphabet) -> list[str]:
        return list(string)


class Set(StringTask):
    """Each symbol that occurs, once, in the order of first occurrence; then the end."""

    name = "set"
    ends = True

    def shortest(self, settings: Alphabet) -> int:
        return 3

    def string_length(self, length: int, settings: Alphabet) -> int:
        return max((length - 1) // 2, length - 1 - settings.symbols)

    def answer(self, string: Sequence[str], settings: Alphabet) -> list[str]:
        return [*dict.fromkeys(string), END]


class MissingDuplicate(Task[Alphabet]):
    """A string twice, with one symbol left out of the second one: which?"""

    name = "missing_duplicate"
    settings_class = Alphabet

    def validate(self, settings: Alphabet, problem: Problem) -> None:
        check_size(problem, "symbols", settings.symbols, 2)

    def vocabulary(self, settings: Alphabet) -> list[str]:
        return [*symbols(settings.symbols), BETWEEN, GAP, ASK]

    def answers(self, settings: Alphabet) -> int:
        return settings.symbols

    def shortest(self, settings: Alphabet) -> int:
        return 4

    def example(self, draws: Draws, length: int, settings: Alphabet) -> Example:
        string = draws.choices(symbols(settings.symbols), (length - 2) // 2)
        gap = draws.one_below(len(string))
        again = [GAP if place == gap else symbol for place, symbol in enumerate(string)]
        return asked([*string, BETWEEN, *again], [string[gap]])


class StackManipulation(Task[Alphabet]):
    """What a stack holds, the top first, after pushes and pops; then the end. A pop of the empty stack does nothing.

    The first symbols are what it holds at the beginning, the last of them on top.
    """

    name = "stack_manipulation"
    settings_class = Alphabet

    def validate(self, settings: Alphabet, problem: Problem) -> None:
        check_size(problem, "symbols", settings.symbols, 2)

    def vocabulary(self, settings: Alphabet) -> list[str]:
        return [*symbols(settings.symbols), PUSH, POP, ASK, END]

    def answers(self, settings: Alphabet) -> int:
        return settings.symbols + 1

    def shortest(self, settings: Alphabet) -> int:
        return 3

    def example(self, draws: Draws, length: int, settings: Alphabet) -> Example:
        alphabet = symbols(settings.symbols)
        stack = draws.choices(alphabet, max(1, (length - 1) // 4))
        question = list(stack)
        # Each symbol on the stack is a word of the answer too.
        left = length - 1 - 2 * len(stack)
        actions = left // 2
        pushes, pushed = draws.below(2, actions), draws.choices(alphabet, actions)
        for is_push, symbol in zip(pushes, pushed, strict=True):
            if is_push and left >= 3:
                stack.append(symbol)
                question += [PUSH, symbol]
                left -= 3
            elif stack or left:
                left -= 0 if stack else 1
                question.append(POP)
                del stack[-1:]
        return asked(question, [*reversed(stack), END])
