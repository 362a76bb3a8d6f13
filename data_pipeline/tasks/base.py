"""What a synthetic task is: words that the model reads, and at some of them the word that is the answer.

An answer stands at the word behind which it is known: the model that has read words 0 ... t predicts the answer at t.
An answer of several words is a continuation: behind the question, and behind each word of it that is shown, the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from data_pipeline.tasks.draws import Draws

Settings = TypeVar("Settings")
Problem = Callable[[str, str], None]
# Where the question ends and the answer is to be written.
ASK = "="
# What ends an answer whose number of words is part of the answer.
END = "."


@dataclass(frozen=True)
class Example:
    """`words` that are read, and `answers`: the answer at each of them, or None where nothing is asked."""

    words: list[str]
    answers: list[str | None]


@dataclass(frozen=True)
class NoSettings:
    """Of a task that leaves nothing to choose."""


class Task(ABC, Generic[Settings]):
    """One task. It holds nothing.

    Attributes:
        name: what configurations call it.
        settings_class: frozen dataclass of what can be chosen.
        tracks: whether every beginning of an example has an answer, so that training may score all of them.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type] = NoSettings
    tracks: ClassVar[bool] = False

    def validate(self, settings: Settings, problem: Problem) -> None:
        """Call `problem(key, what is wrong)` for every setting that cannot be used."""

    @abstractmethod
    def vocabulary(self, settings: Settings) -> list[str]:
        """Every word that examples and answers may have, each once, in an order that never changes."""

    @abstractmethod
    def answers(self, settings: Settings) -> int:
        """How many different words an answer may be: guessing one of them is right once in so many times."""

    @abstractmethod
    def shortest(self, settings: Settings) -> int:
        """The fewest words that an example needs."""

    @abstractmethod
    def example(self, draws: Draws, length: int, settings: Settings) -> Example:
        """A random example of at most `length` words, as long as the task's form allows; `length` is at least the
        shortest."""

    def chance(self, settings: Settings) -> float:
        """The accuracy of a guess among the words that an answer may be."""
        return 1 / self.answers(settings)


class TrackingTask(Task[Settings]):
    """A task whose answer follows from what was read so far, at every word."""

    tracks = True

    def shortest(self, settings: Settings) -> int:
        return 1

    @abstractmethod
    def inputs(self, draws: Draws, length: int, settings: Settings) -> list[str]:
        """What is read: `length` words."""

    @abstractmethod
    def tracked(self, words: Sequence[str], settings: Settings) -> list[str | None]:
        """The answer at each of `words`."""

    def example(self, draws: Draws, length: int, settings: Settings) -> Example:
        words = self.inputs(draws, length, settings)
        return Example(words, self.tracked(words, settings))


def asked(question: Sequence[str], answer: Sequence[str]) -> Example:
    """The example that reads `question`, then `ASK`, then all of `answer` but its last word."""
    words = [*question, ASK, *answer[:-1]]
    silent: list[str | None] = [None] * len(question)
    return Example(words, silent + list(answer))


def symbols(count: int) -> list[str]:
    """The alphabet of `count` symbols: a, b, ... z, then with numbers."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [letters[place % 26] + (str(place // 26) if place >= 26 else "") for place in range(count)]
