"""Fixtures that several test folders share."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import TINY_RUN, prepared_corpus

# The files whose tests take longest, first: one of them last would leave the other processes idle.
LONGEST = (
    "tests/docs/test_documented_commands.py",
    "tests/kernels/test_interpreted.py",
    "tests/docs/test_readme.py",
    "tests/kernels/test_compile_mlstm.py",
    "tests/train/checkpoints/test_resume.py",
)

OUR_PACKAGES = ("conf", "data_pipeline", "kernels", "launch", "model", "slurm", "tests", "train")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The others stay in their order, be it that of the files or pytest-randomly's."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.fixture(autouse=True)
def _seeded_generators() -> None:
    """What a test draws from the global generators does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment_left_as_found() -> Iterator[None]:
    """Runs of later tests get the environment of this process. TorchInductor, for one, leaves variables in it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() | before.keys():
        if name == "PYTEST_CURRENT_TEST":
            continue
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


def _logging_as_it_is() -> dict[str, tuple]:
    """What decides whether a warning of ours arrives: of the whole process, of the root, of each of our loggers."""
    root = logging.getLogger()
    state: dict[str, tuple] = {"process": (root.manager.disable,), "root": (root.level, root.disabled)}
    for name, logger in list(root.manager.loggerDict.items()):
        if name.partition(".")[0] in OUR_PACKAGES and isinstance(logger, logging.Logger):
            state[name] = logger.level, logger.disabled, logger.propagate, logger.isEnabledFor(logging.WARNING)
    return state


@pytest.fixture(autouse=True)
def _logging_left_as_found() -> Iterator[None]:
    """A test that silences a logger for the tests after it fails itself: they would fail in its place, by their order.

    A logger that the test itself is the first to ask for has to be as new ones are.
    """
    before = _logging_as_it_is()
    yield
    after = _logging_as_it_is()
    new = logging.NOTSET, False, True, True
    changed = {name: (before.get(name, new), state) for name, state in after.items() if state != before.get(name, new)}
    assert not changed, f"logging is left changed, from and to (level, disabled, propagate, warns): {changed}"


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> Path:
    """A prepared corpus of about 30,000 tokens, 320 ids, from generated text with a held-out split."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 6))) for _ in range(200)]
    texts = []
    for _ in range(40):
        sentences = (" ".join(generator.choices(words, k=generator.randint(4, 12))) for _ in range(30))
        texts.append(".\n".join(sentences))
    return prepared_corpus(tmp_path_factory.mktemp("small_corpus"), texts)


@pytest.fixture
def tiny_run(small_corpus, tmp_path):
    """Overrides of a small run named "run" in tmp_path."""
    return ["name=run", f"run_root={tmp_path}", f"corpus.directory={small_corpus}", *TINY_RUN]
