"""A board that every process of a run writes on and reads, without any of them waiting for another.

It is the store through which the processes met, by a connection of its own: those of process groups may be waiting.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


class BoardError(RuntimeError):
    """The store does not answer."""


class Board:
    """Texts by key, each of one run's start."""

    def __init__(self, prefix: str, patience: timedelta):
        """Connects to the store that torchrun's variables name. Raises BoardError after `patience`, as all methods do.

        `prefix`: distinguishes the keys from those of another start that has the same store.
        """
        # Otherwise one of the training processes is where the store is.
        self.is_of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._patience = patience
        self._is_broken = False
        self._prefix = prefix
        # A store whose process is stopped lets whoever asks wait for ever: this thread does.
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._ask, name="board", daemon=True).start()
        self._store: dist.Store = self._answer(self._connect)

    def put(self, key: str, text: str) -> None:
        """Write `text` in the place of what is there."""
        self._answer(lambda: self._store.set(key, text))

    def put_first(self, key: str, text: str) -> str:
        """Write `text` unless something is there; returns what is there then."""
        return self._answer(lambda: self._store.compare_set(key, "", text)).decode()

    def read(self, keys: Sequence[str]) -> list[str] | None:
        """What is there under each key; None where one of them has nothing yet."""

        def read() -> list[str] | None:
            if not self._store.check(list(keys)):
                return None
            return [value.decode() for value in self._store.multi_get(list(keys))]

        return self._answer(read)

    def _connect(self) -> dist.Store:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.PrefixStore(self._prefix, dist.TCPStore(address, port, is_master=False, timeout=self._patience))

    def _ask(self) -> None:
        while True:
            action, answers = self._asked.get()
            try:
                answers.put(action())
            except RuntimeError as error:
                # torch prints the frames of every attempt at a connection that is broken.
                self._is_broken = isinstance(error, dist.DistNetworkError)
                answers.put(BoardError(str(error).partition("\n")[0]))

    def _answer(self, action: Callable[[], Value]) -> Value:
        if self._is_broken:
            raise BoardError("the connection is broken")
        answers = queue.SimpleQueue[Any]()
        self._asked.put((action, answers))
        try:
            answer = answers.get(timeout=self._patience.total_seconds())
        except queue.Empty:
            raise BoardError(f"no answer within {self._patience.total_seconds():g} s") from None
        if isinstance(answer, BoardError):
            raise answer
        found: Value = answer
        return found
