"""Answers that a suite has had of a model, kept as they come: what is done is not done again after a kill.

One JSON object a line, `{"key": ..., "answer": ...}`; the first says of what, `{"kind": "header", "format_version": 1,
"identity": ...}`. Answers of another identity (model, precision, settings), or in another format, are
thrown away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from train.parallel.mesh import Mesh
from train.run_directory import read_lines, write_atomically

FORMAT_VERSION = 1
Question = TypeVar("Question")


class Answers:
    """Every rank holds all; rank 0 writes them to a file."""

    def __init__(self, path: Path, identity: Any, mesh: Mesh):
        """Collective. `identity`: JSON values that say whose answers these are."""
        self._path, self._mesh = path, mesh
        header = {"kind": "header", "format_version": FORMAT_VERSION, "identity": identity}
        known: dict[str, Any] = {}
        if mesh.is_main:
            lines = read_lines(path)
            if lines[:1] == [header]:
                known = {line["key"]: line["answer"] for line in lines[1:] if {"key", "answer"} <= line.keys()}
            # Anew: a kill may have cut the last line short.
            write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in [header, *_as_lines(known)]))
        self._known: dict[str, Any] = mesh.broadcast_object(known, group="world")

    def ask(
        self,
        questions: Sequence[Question],
        key_of: Callable[[Question], Any],
        size_of: Callable[[Question], int],
        answer: Callable[[list[Question]], list[Any]],
        batch_size: int,
    ) -> list[Any]:
        """The answers to all questions, in their order, as JSON values. Collective.

        Args:
            key_of: JSON values that say what is asked. Equal questions are asked once.
            size_of: those of like size come into one batch, the largest first: what has no room shows at once.
            answer: of at most `batch_size` questions; each rank takes batches of its own.
        """
        keys = [_digest(key_of(question)) for question in questions]
        asked = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._known}
        open_questions = sorted(asked.items(), key=lambda item: -size_of(item[1]))
        rank, ranks = self._mesh.rank, self._mesh.size_of("world")
        for first in range(0, len(open_questions), batch_size * ranks):
            begin = first + rank * batch_size
            own = open_questions[begin : begin + batch_size]
            answers = answer([question for _, question in own]) if own else []
            of_rank = {key: found for (key, _), found in zip(own, answers, strict=True)}
            self._keep({k: v for one in self._mesh.gather_objects(of_rank, group="world") for k, v in one.items()})
        return [self._known[key] for key in keys]

    def _keep(self, found: dict[str, Any]) -> None:
        self._known |= found
        if self._mesh.is_main:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in _as_lines(found))

    def forget(self) -> None:
        """The suite is done: the file goes."""
        if self._mesh.is_main:
            self._path.unlink(missing_ok=True)


def _as_lines(known: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "answer": answer} for key, answer in known.items()]


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()
