"""Reading over a network that breaks: limits on time, attempts with growing pauses, and a word of it while it lasts."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import logging
import queue
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from conf.passwords import without_passwords
from conf.problems import positive

FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 30.0
# Of what is not known to be the network's fault.
ATTEMPTS = 4
_LIBRARIES = {"requests", "urllib3", "httpx", "httpcore", "aiohttp", "botocore", "google", "azure"}
# Answers of HTTP that say: later perhaps.
_MAY_PASS = (408, 425, 429)
# Its author has turned the network off.
_NEVER_PASS = ("OfflineModeIsEnabled",)
_LOG = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class NetworkConfig:
    """How long a corpus at a URL, and text that is read over a network, is tried for."""

    # Seconds after which one request that has no answer is given up, and made again.
    attempt_seconds: float = 60.0
    # Seconds that a network may fail, or not answer, before the run ends and names what it could not read.
    total_seconds: float = 600.0


def validate_network(config: NetworkConfig, prefix: str) -> list[str]:
    """The problems of the keys under `prefix`, one line each. Pure."""
    return [
        *positive(f"{prefix}.attempt_seconds", config.attempt_seconds),
        *positive(f"{prefix}.total_seconds", config.total_seconds),
    ]


@dataclass
class Request:
    """Something that is being read over the network."""

    what: str
    # How it fails at present; "" while it does not.
    trouble: str = ""


@dataclass
class Requests:
    """What this process reads over the network now. A run that waits for it does not hang."""

    _open: dict[int, Request] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @contextlib.contextmanager
    def noted(self, request: Request) -> Iterator[None]:
        """Inside, `request` is being read."""
        number = next(self._numbers)
        self._open[number] = request
        try:
            yield
        finally:
            del self._open[number]

    @property
    def is_reading(self) -> bool:
        return bool(self._open)

    @property
    def trouble(self) -> str:
        """What does not arrive at present, and why; "" where all does."""
        return next((request.trouble for request in list(self._open.values()) if request.trouble), "")


REQUESTS = Requests()


class GivenUp(Exception):
    """The network has failed for too long. `attempts`, `seconds`: that were spent; the reason is its cause."""

    def __init__(self, attempts: int, seconds: float, reason: str):
        super().__init__(f"cannot be fetched: {attempts} attempts in {seconds:.0f} s, the last of them: {reason}")


class Attempts:
    """The failures of one request, which begin anew with each success."""

    def __init__(self, request: Request, config: NetworkConfig, shown: Callable[[BaseException], str]):
        """`shown`: the words of an error, without secrets."""
        self._request, self._config, self._shown = request, config, shown
        self._number = 0
        # When the first of them failed.
        self._begun = 0.0

    def succeed(self) -> None:
        """Something has arrived."""
        self._number, self._request.trouble = 0, ""

    def fail(self, error: BaseException) -> None:
        """Wait before the next attempt. Raises GivenUp when there is to be none."""
        now = time.monotonic()
        self._number += 1
        self._begun = now if self._number == 1 else self._begun
        spent = now - self._begun
        reason = f"{type(error).__name__}: {self._shown(error)}"
        wait = min(_LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (self._number - 1)) * random.uniform(0.5, 1.5)
        is_over = spent + wait > self._config.total_seconds
        if is_over or (self._number >= ATTEMPTS and not is_of_network(error)):
            raise GivenUp(self._number, spent, reason) from None
        self._request.trouble = f"{self._request.what} does not arrive ({reason}), attempt {self._number}"
        _LOG.warning("%s; the next in %.1f s", self._request.trouble, wait)
        time.sleep(wait)


def persist(
    what: str,
    action: Callable[[], Result],
    config: NetworkConfig,
    shown: Callable[[BaseException], str] = lambda error: without_passwords(str(error)),
) -> Result:
    """The result of `action`, tried again for as long as `config` says. FileNotFoundError is raised at once, and so is
    what else has an answer of its own (`Refused`). Raises GivenUp.

    Each attempt is made in a thread, and left alone when its time is over: few file systems have limits of their own.
    """
    request = Request(what)
    attempts = Attempts(request, config, shown)
    with REQUESTS.noted(request):
        while True:
            try:
                return _within(action, config.attempt_seconds)
            except (FileNotFoundError, Refused):
                raise
            except Exception as error:
                attempts.fail(error)


class Refused(Exception):
    """What arrived is not what was asked for, however often it is asked for."""


def is_of_network(error: BaseException | None) -> bool:
    """Whether an error, or one that it follows from, says that the network or a server fails for a time."""
    while error is not None:
        if type(error).__name__ in _NEVER_PASS:
            return False
        status = _status(error)
        if status is not None:
            return status >= 500 or status in _MAY_PASS
        if isinstance(error, ConnectionError | TimeoutError | http.client.HTTPException | ssl.SSLError):
            return True
        if type(error).__module__.partition(".")[0] in _LIBRARIES:
            return True
        error = error.__cause__ or error.__context__
    return False


def _status(error: BaseException) -> int | None:
    """The status of HTTP that an error is about."""
    for found in (getattr(error, "status", None), getattr(getattr(error, "response", None), "status_code", None)):
        if isinstance(found, int):
            return found
    return None


def _within(action: Callable[[], Result], seconds: float) -> Result:
    answers = queue.SimpleQueue[tuple[bool, Any]]()

    def answer() -> None:
        try:
            answers.put((True, action()))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            answers.put((False, error))

    threading.Thread(target=answer, name=threading.current_thread().name, daemon=True).start()
    try:
        is_result, found = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if not is_result:
        raise found
    result: Result = found
    return result
