"""Every formal language against a second definition of it: slow, and written from the statement of the task alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from conf.settings import build_settings
from data_pipeline.tasks.base import Example
from data_pipeline.tasks.draws import Draws
from data_pipeline.tasks.state_tracking import Alphabet, Modulus
from data_pipeline.tasks.tasks import FORMAL, TASKS
from tests.documented import quoted, table

LENGTHS = (2, 3, 4, 5, 9, 18, 40, 41, 97)


def parity(words: list[str]) -> str:
    return "odd" if words.count("1") % 2 else "even"


def even_pairs(words: list[str]) -> str:
    return "even" if sum(a != b for a, b in pairwise(words)) % 2 == 0 else "odd"


def cycle_navigation(words: list[str]) -> str:
    return str(sum(int(word) for word in words if word != "stay") % 5)


def modular_arithmetic(words: list[str]) -> str | None:
    # Python's own precedence.
    return None if words[-1] in "+-*" else str(eval(" ".join(words)) % 5)


def majority(words: list[str]) -> str:
    return min(set(words), key=lambda word: (-words.count(word), word))


def majority_count(words: list[str]) -> str:
    return str(min(50, Counter(words).most_common(1)[0][1]))


def s3(words: list[str]) -> str:
    """By permutation matrices."""
    product = np.eye(3, dtype=int)
    for word in words:
        matrix = np.zeros((3, 3), dtype=int)
        for place, image in enumerate(word):
            matrix[int(image) - 1, place] = 1
        product = matrix @ product
    return "".join(str(row + 1) for row in product.argmax(0))


TRACKED: dict[str, Callable[[list[str]], str | None]] = {
    "parity": parity,
    "even_pairs": even_pairs,
    "cycle_navigation": cycle_navigation,
    "modular_arithmetic": modular_arithmetic,
    "majority": majority,
    "majority_count": majority_count,
    "s3": s3,
}


def stack(question: list[str]) -> list[str]:
    text = " ".join(question)
    begin = re.split(r" ?(?:push|pop)\b", text)[0].split()
    held = "".join(begin)
    for push in re.findall(r"push (\w)|pop", text):
        held = held + push if push else held[:-1]
    return [*held[::-1], "."]


def set_of(question: list[str]) -> list[str]:
    return [word for place, word in enumerate(question) if word not in question[:place]] + ["."]


ASKED: dict[str, Callable[[list[str]], list[str]]] = {
    "bucket_sort": lambda q: [letter for letter in "abcdefgh" for _ in range(q.count(letter))],
    "odds_first": lambda q: [q[n] for n in range(len(q)) if n % 2 == 0] + [q[n] for n in range(len(q)) if n % 2],
    "reverse_string": lambda q: [q[len(q) - 1 - n] for n in range(len(q))],
    "repetition": lambda q: q,
    "set": set_of,
    "stack_manipulation": stack,
    "missing_duplicate": lambda q: [q[q.index("_") - len(q) // 2 - 1]],
    "modular_arithmetic_brackets": lambda q: [str(eval(" ".join(q)) % 5)],
}


def examples(name: str, count: int = 60) -> list[Example]:
    task = TASKS[name]
    settings = task.settings_class()
    return [
        task.example(Draws("test", number), length, settings)
        for number in range(count)
        if (length := LENGTHS[number % len(LENGTHS)]) >= task.shortest(settings)
    ]


def test_every_formal_language_is_tested_here():
    assert {task.name for task in FORMAL} == {*TRACKED, *ASKED, "solve_equation"}


@pytest.mark.parametrize("name", TRACKED)
def test_every_beginning_has_its_answer(name):
    for example in examples(name):
        assert example.answers == [TRACKED[name](example.words[: n + 1]) for n in range(len(example.words))]
        assert example.answers[-1] is not None


@pytest.mark.parametrize("name", ASKED)
def test_the_answer_follows_from_the_question(name):
    for example in examples(name):
        first = next(n for n, answer in enumerate(example.answers) if answer is not None)
        question, expected = example.words[:first], ASKED[name](example.words[:first])
        assert example.words == [*question, "=", *expected[:-1]]
        assert example.answers == [*([None] * first), *expected]


def test_an_equation_has_one_solution_which_is_the_answer():
    seen = Counter()
    for example in examples("solve_equation", 300):
        text = " ".join(example.words)
        left, right = text.removesuffix(" ?").split(" = ")
        assert text.endswith(" ?") and left.count("x") == 1
        solutions = [x for x in range(5) if eval(left, {"x": x}) % 5 == int(right)]
        assert example.answers == [*([None] * (len(example.words) - 1)), str(solutions[0])] and len(solutions) == 1
        seen += Counter(operator for operator in "+-*" if operator in left)
    assert min(seen.values()) > 50


@pytest.mark.parametrize("name", [task.name for task in FORMAL])
def test_examples_have_the_length_that_is_asked_for(name):
    """As nearly as their form allows, never more; and the words and the answers are those of the vocabulary."""
    task = TASKS[name]
    settings = task.settings_class()
    vocabulary = task.vocabulary(settings)
    assert len(set(vocabulary)) == len(vocabulary)
    longest = {"set": 35, "stack_manipulation": 20}.get(name, 36)
    for number in range(100):
        example = task.example(Draws(number), 40, settings)
        assert longest <= len(example.words) <= 40 and len(example.words) == len(example.answers)
        assert {*example.words, *example.answers} <= {*vocabulary, None}
    shortest = task.shortest(settings)
    assert len(task.example(Draws(0), shortest, settings).words) <= shortest


# All answers are alike likely, so that no guess is better than chance.
UNIFORM = ("parity", "even_pairs", "cycle_navigation", "s3", "solve_equation", "missing_duplicate", "repetition")


@pytest.mark.parametrize("name", [task.name for task in FORMAL])
def test_chance_is_a_guess_among_the_answers_that_occur(name):
    task = TASKS[name]
    settings = task.settings_class()
    seen = Counter()
    for number in range(1000):
        known = [answer for answer in task.example(Draws("chance", number), 24, settings).answers if answer]
        seen.update(known[-1:] if task.tracks else known)
    if name == "majority_count":
        assert task.chance(settings) == 1 / 50 and {int(count) for count in seen} <= set(range(1, 51))
        return
    assert len(seen) == task.answers(settings) and task.chance(settings) == 1 / len(seen)
    if name in UNIFORM:
        assert seen.most_common(1)[0][1] / seen.total() == pytest.approx(task.chance(settings), abs=0.05)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("parity", {"modulus": 5}, "no such key"),
        ("cycle_navigation", {"modulus": 1}, "must be between 2 and 10000 (1)"),
        ("solve_equation", {"modulus": 6}, "must be a prime, or some equations have no one solution (6)"),
        ("majority", {"symbols": 1}, "must be between 2 and 10000 (1)"),
    ],
)
def test_settings_that_cannot_be_used_are_named(name, values, message):
    from data_pipeline.tasks.config import TaskConfig
    from data_pipeline.tasks.tasks import validate_task

    (problem,) = validate_task(TaskConfig(name, settings=values), 40, "corpus.task")
    assert problem.startswith(f"corpus.task.settings.{next(iter(values))}: ") and message in problem


def test_settings_change_the_words():
    assert TASKS["cycle_navigation"].vocabulary(Modulus(3))[-1] == "2"
    assert TASKS["repetition"].vocabulary(build_settings(Alphabet, {"symbols": 30}))[26] == "a1"
    example = TASKS["bucket_sort"].example(Draws(1), 200, Alphabet(symbols=40))
    known = [answer for answer in example.answers if answer is not None]
    assert known == sorted(known, key=lambda word: (len(word) > 1, word))


def test_the_examples_and_the_chances_of_the_page_are_right():
    rows = table("guides/evaluation.md", "task")
    assert [quoted(row[0])[0] for row in rows] == list(TASKS)
    for name, example, answer, chance in ((quoted(row[0])[0], *(cell for cell in row[1:])) for row in rows):
        task = TASKS[name]
        settings = task.settings_class()
        words, expected = quoted(example)[0].split(), quoted(answer)[0].split()
        assert set(words) | set(expected) - {"..."} <= {*task.vocabulary(settings), "..."}, name
        if task.tracks:
            assert ("*" in row_of(rows, name)) and task.tracked(words, settings)[-1] == expected[0], name
        elif words[-1] == "=":
            assert ASKED[name](words[:-1]) == expected, name
        counts = {"2/`vocabulary` (8192)": 2 / 8192}
        fraction = counts.get(chance) or int(chance.split("/")[0]) / int(chance.split("/")[1])
        assert task.chance(settings) == fraction, name


def row_of(rows: list[list[str]], name: str) -> str:
    return next(row[0] for row in rows if quoted(row[0])[0] == name)
