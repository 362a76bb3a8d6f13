"""Associative recall and ListOps against their definitions."""

import statistics

import numpy as np
import pytest

from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.draws import Draws
from data_pipeline.tasks.list_operations import Lists
from data_pipeline.tasks.recall import Recall
from data_pipeline.tasks.tasks import TASKS, validate_task


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (128, 8), (256, 16), (16, 4), (65, 4)])
def test_each_key_is_asked_for_once_and_answered_by_its_value(length, pairs):
    settings = Recall(pairs=pairs, vocabulary=100)
    for number in range(20):
        example = TASKS["mqar"].example(Draws(number), length, settings)
        assert len(example.words) == length // 2 * 2
        head, rest = example.words[: 2 * pairs], example.words[2 * pairs :]
        asked = [(word, answer) for word, answer in zip(example.words, example.answers, strict=True) if answer]
        assert sorted(asked) == sorted(zip(head[::2], head[1::2], strict=True)) and len(asked) == pairs
        assert [word for word in rest if word.startswith("k")] == [word for word, _ in asked]
        assert not any(example.answers[: 2 * pairs])


def test_near_queries_are_common_and_their_order_is_not_that_of_the_pairs():
    settings, near, in_order = Recall(pairs=4, vocabulary=100), [], 0
    for number in range(400):
        words = TASKS["mqar"].example(Draws(number), 128, settings).words
        places = [place for place, word in enumerate(words[8:]) if word.startswith("k")]
        near.append(min(places))
        in_order += [words[8 + place] for place in places] == words[:8:2]
    # The first of four draws in proportion to 1/n among 60 places has the mean rank of sum(1) / sum(1/n) = 13.
    assert statistics.median(near) < 4 and in_order < 60


def evaluate(words):
    """From the end to the beginning, on a stack."""
    stack = []
    for word in reversed(words):
        if word == "]":
            stack.append(word)
        elif word.isdigit():
            stack.append(int(word))
        else:
            values = []
            while stack[-1] != "]":
                values.append(stack.pop())
            stack[-1] = {
                "[MAX": lambda v: max(v),
                "[MIN": lambda v: min(v),
                "[SM": lambda v: sum(v) % 10,
                "[MED": lambda v: int(np.median(v)),
            }[word](values)
    (value,) = stack
    return str(value)


@pytest.mark.parametrize("length", [4, 5, 30, 200, 1000])
def test_lists_have_their_value_and_their_length(length):
    settings = Lists()
    depths = set()
    for number in range(40):
        example = TASKS["listops"].example(Draws(number), length, settings)
        assert length * 0.4 <= len(example.words) <= length
        assert example.answers[:-1] == [None] * (len(example.words) - 1)
        assert example.answers[-1] == evaluate(example.words)
        opened = np.cumsum([(word[0] == "[") - (word == "]") for word in example.words])
        assert opened[-1] == 0 and (opened[:-1] > 0).all()
        depths.add(int(opened.max()))
    assert max(depths) <= 10 and (length < 1000 or max(depths) > 3)


def test_what_does_not_fit_is_refused():
    problems = validate_task(TaskConfig("mqar", settings={"pairs": 48}), 100, "corpus.task")
    assert problems == ["corpus.task: examples have 192 words at least, and 100 are asked for; ask for more"]
    (problem,) = validate_task(TaskConfig("listops", scored="every"), 100, "corpus.task")
    assert problem == "corpus.task.scored: the beginnings of listops have no answers (every); set it to answer"
    (problem,) = validate_task(TaskConfig("party"), 100, "a")
    assert problem.startswith("a.name: no such task ('party') (did you mean 'parity'?); choose one of parity,")
    found = validate_task(TaskConfig("mqar", settings={"vocabulary": 8, "pairs": 5, "exponent": 0.0}), 64, "a")
    assert [line.split(":")[0] for line in found] == ["a.settings.pairs", "a.settings.exponent"]
