"""Formal languages of which every beginning has an answer: those that a state of fixed size decides, and counting.

The tasks are those of arXiv 2405.04517, appendix B.1 (after arXiv 2207.02098), and the word problem of S3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from data_pipeline.tasks.base import NoSettings, Problem, TrackingTask, symbols
from data_pipeline.tasks.draws import Draws

EVEN, ODD = "even", "odd"
# The largest count that majority_count answers with.
LARGEST_COUNT = 50


@dataclass(frozen=True)
class Alphabet:
    """Of a task about strings."""

    # Different symbols of a string.
    symbols: int = 8


@dataclass(frozen=True)
class Modulus:
    """Of a task about numbers."""

    # Numbers are 0 ... modulus - 1.
    modulus: int = 5


def check_size(problem: Problem, key: str, value: int, least: int, most: int = 10_000) -> None:
    """`value` must be in `least`..`most`."""
    if not least <= value <= most:
        problem(key, f"must be between {least} and {most} ({value})")


def numbers(modulus: int) -> list[str]:
    """0 ... modulus - 1, as words."""
    return [str(number) for number in range(modulus)]


class Parity(TrackingTask[NoSettings]):
    """Whether the number of ones is even."""

    name = "parity"

    def vocabulary(self, settings: NoSettings) -> list[str]:
        return ["0", "1", EVEN, ODD]

    def answers(self, settings: NoSettings) -> int:
        return 2

    def inputs(self, draws: Draws, length: int, settings: NoSettings) -> list[str]:
        return draws.choices("01", length)

    def tracked(self, words: Sequence[str], settings: NoSettings) -> list[str | None]:
        found: list[str | None] = []
        is_odd = False
        for word in words:
            is_odd ^= word == "1"
            found.append(ODD if is_odd else EVEN)
        return found


class EvenPairs(TrackingTask[NoSettings]):
    """Whether the number of places where two neighbours differ is even."""

    name = "even_pairs"

    def vocabulary(self, settings: NoSettings) -> list[str]:
        return ["a", "b", EVEN, ODD]

    def answers(self, settings: NoSettings) -> int:
        return 2

    def shortest(self, settings: NoSettings) -> int:
        return 2

    def inputs(self, draws: Draws, length: int, settings: NoSettings) -> list[str]:
        return draws.choices("ab", length)

    def tracked(self, words: Sequence[str], settings: NoSettings) -> list[str | None]:
        # Neighbours differ an even number of times exactly where the last word is the first.
        return [EVEN if word == words[0] else ODD for word in words]


class CycleNavigation(TrackingTask[Modulus]):
    """The place on a cycle of `modulus` places, after steps forward, back, and none; from place 0."""

    name = "cycle_navigation"
    settings_class = Modulus

    def validate(self, settings: Modulus, problem: Problem) -> None:
        check_size(problem, "modulus", settings.modulus, 2)

    def vocabulary(self, settings: Modulus) -> list[str]:
        return ["+1", "-1", "stay", *numbers(settings.modulus)]

    def answers(self, settings: Modulus) -> int:
        return settings.modulus

    def inputs(self, draws: Draws, length: int, settings: Modulus) -> list[str]:
        return draws.choices(["+1", "-1", "stay"], length)

    def tracked(self, words: Sequence[str], settings: Modulus) -> list[str | None]:
        found: list[str | None] = []
        place = 0
        for word in words:
            place = (place + {"+1": 1, "-1": -1, "stay": 0}[word]) % settings.modulus
            found.append(str(place))
        return found


class ModularArithmetic(TrackingTask[Modulus]):
    """The value, modulo `modulus`, of numbers with +, - and * between them; * binds first. Asked at each number."""

    name = "modular_arithmetic"
    settings_class = Modulus

    def validate(self, settings: Modulus, problem: Problem) -> None:
        check_size(problem, "modulus", settings.modulus, 2)

    def vocabulary(self, settings: Modulus) -> list[str]:
        return [*numbers(settings.modulus), "+", "-", "*"]

    def answers(self, settings: Modulus) -> int:
        return settings.modulus

    def inputs(self, draws: Draws, length: int, settings: Modulus) -> list[str]:
        terms = (length + 1) // 2
        found, operators = draws.choices(numbers(settings.modulus), terms), draws.choices("+-*", terms)
        return [word for pair in zip(found, operators, strict=True) for word in pair][:-1]

    def tracked(self, words: Sequence[str], settings: Modulus) -> list[str | None]:
        found: list[str | None] = []
        # The value is total + product, where a product that goes on stays apart.
        total, product, operator = 0, 0, "+"
        for word in words:
            if word in ("+", "-", "*"):
                operator = word
                found.append(None)
                continue
            number = int(word)
            if operator == "*":
                product *= number
            else:
                total, product = total + product, number if operator == "+" else -number
            total, product = total % settings.modulus, product % settings.modulus
            found.append(str((total + product) % settings.modulus))
        return found


class Majority(TrackingTask[Alphabet]):
    """The symbol that occurs most often; of several the first of the alphabet."""

    name = "majority"
    settings_class = Alphabet

    def validate(self, settings: Alphabet, problem: Problem) -> None:
        check_size(problem, "symbols", settings.symbols, 2)

    def vocabulary(self, settings: Alphabet) -> list[str]:
        return symbols(settings.symbols)

    def answers(self, settings: Alphabet) -> int:
        return settings.symbols

    def inputs(self, draws: Draws, length: int, settings: Alphabet) -> list[str]:
        return draws.choices(symbols(settings.symbols), length)

    def tracked(self, words: Sequence[str], settings: Alphabet) -> list[str | None]:
        order = {symbol: place for place, symbol in enumerate(symbols(settings.symbols))}
        counts: Counter[str] = Counter()
        found: list[str | None] = []
        best = words[0]
        for word in words:
            counts[word] += 1
            if (counts[word], -order[word]) > (counts[best], -order[best]):
                best = word
            found.append(best)
        return found


class MajorityCount(Majority):
    """How often the symbol that occurs most often does; 50 stands for all larger counts too."""

    name = "majority_count"

    def vocabulary(self, settings: Alphabet) -> list[str]:
        return [*symbols(settings.symbols), *self._counts()]

    def answers(self, settings: Alphabet) -> int:
        return len(self._counts())

    def tracked(self, words: Sequence[str], settings: Alphabet) -> list[str | None]:
        counts: Counter[str] = Counter()
        found: list[str | None] = []
        most = 0
        for word in words:
            counts[word] += 1
            most = max(most, counts[word])
            found.append(str(min(most, LARGEST_COUNT)))
        return found

    def _counts(self) -> list[str]:
        return [str(count) for count in range(1, LARGEST_COUNT + 1)]


class S3(TrackingTask[NoSettings]):
    """The word problem of the permutations of three things: the product of all so far, the first applied first.

    A permutation is written as the images of 1, 2 and 3.
    """

    name = "s3"

    def vocabulary(self, settings: NoSettings) -> list[str]:
        return ["".join(images) for images in permutations("123")]

    def answers(self, settings: NoSettings) -> int:
        return 6

    def inputs(self, draws: Draws, length: int, settings: NoSettings) -> list[str]:
        return draws.choices(self.vocabulary(settings), length)

    def tracked(self, words: Sequence[str], settings: NoSettings) -> list[str | None]:
        found: list[str | None] = []
        product = "123"
        for word in words:
            product = "".join(word[int(image) - 1] for image in product)
            found.append(product)
        return found
