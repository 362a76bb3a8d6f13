"""Folders on any file system that fsspec opens: messages without their passwords, and patience with a network."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from conf.passwords import HIDDEN, secrets_of, without_passwords

ATTEMPTS = 4
FIRST_WAIT_SECONDS = 0.5
Result = TypeVar("Result")


def open_folder(url: str) -> tuple[Any, str]:
    """The file system of a folder at a URL or a path, and the folder's name there.

    Raises ImportError or ValueError where there is no such file system here, and whatever a server says.
    """
    system, root = fsspec.core.url_to_fs(url.rstrip("/"))
    return system, str(root)


def shown(error: BaseException, url: str) -> str:
    """What the file system of `url` says, which may name a password or another secret in its own way."""
    text = without_passwords(str(error))
    for secret in secrets_of(url):
        text = text.replace(secret, HIDDEN)
    return text


def persistently(action: Callable[[], Result]) -> Result:
    """The result of `action`, which is tried again after a while where it fails: each file system has its own errors
    for a network that fails for a moment. Raises FileNotFoundError at once, the last error after ATTEMPTS."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception:
            wait(attempt)
    return action()


def wait(attempt: int) -> None:
    """For a while that is longer after each attempt, and never the same for two processes."""
    time.sleep(FIRST_WAIT_SECONDS * 2**attempt * random.uniform(0.5, 1.5))
