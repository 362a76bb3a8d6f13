"""One model and one server of it for the tests that leave both as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.model.server.serving import Alone, Server, save_small_model, serving

SLOTS = 4
MAX_NEW_TOKENS = 500


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("served") / "weights")


@pytest.fixture(scope="session")
def alone(weights: Path) -> Alone:
    return Alone(weights)


@pytest.fixture(scope="session")
def endless_and_ending(alone: Alone) -> tuple[list[int], list[int]]:
    return alone.prompts(MAX_NEW_TOKENS)


@pytest.fixture(scope="session")
def endless(endless_and_ending: tuple[list[int], list[int]]) -> list[int]:
    """A prompt whose greedy continuation has as many tokens as the server of the tests gives."""
    return endless_and_ending[0]


@pytest.fixture(scope="session")
def ending(endless_and_ending: tuple[list[int], list[int]]) -> list[int]:
    """A prompt whose greedy continuation comes to the end of a document before that."""
    return endless_and_ending[1]


@pytest.fixture(scope="session")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "stderr"
    limits = [f"slots={SLOTS}", "queue=12", "max_prompt_tokens=400", "max_body_bytes=20000", "prefill_tokens=64"]
    with serving(weights, log, *limits, f"max_new_tokens={MAX_NEW_TOKENS}") as server:
        yield server


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test asked the common server for, nothing of it stays there."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").wait_until_idle(SLOTS)
