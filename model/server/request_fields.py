"""The fields of a JSON body, read one by one: wrong ones are refused all at once, and so is what nobody reads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from conf.problems import suggestion, undecodable
from model.server.errors import ApiError


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that `body` spells. Raises ApiError (400) for anything else."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON that can be read ({error})") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_kind(values)}")
    return values


class RequestFields:
    """Reads the fields of `values`; `finish` raises one ApiError (400) for all that was wrong with them."""

    def __init__(self, values: dict[str, Any]):
        self._values = values
        self._known: list[str] = []
        self._problems: list[tuple[str, str]] = []

    def problem(self, key: str, text: str) -> None:
        self._problems.append((key, f"{key}: {text}"))

    def take(self, key: str) -> Any:
        """The value of `key` as it stands; None also where it is not given."""
        self._known.append(key)
        return self._values.get(key)

    def integer(self, key: str, low: int, high: int) -> int | None:
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            self.problem(key, f"must be a whole number, not {_kind(value)}")
            return None
        if not low <= value <= high:
            self.problem(key, f"must be from {low} to {high}, not {value}")
            return None
        return value

    def number(self, key: str, default: float) -> float:
        value = self.take(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            self.problem(key, f"must be a number, not {_kind(value)}")
            return default
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            self.problem(key, f"must be true or false, not {_kind(value)}")
        return value is True

    def strings(self, key: str, most: int, longest: int) -> tuple[str, ...]:
        """One text or a list of up to `most`, none empty or of more than `longest` characters."""
        value = self.take(key)
        texts = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            self.problem(key, f"must be a text or a list of texts, not {_kind(value)}")
            return ()
        if len(texts) > most:
            self.problem(key, f"at most {most} texts are taken, not {len(texts)}")
        elif any(not 0 < len(text) <= longest for text in texts):
            self.problem(key, f"a text must have from 1 to {longest} characters")
        self.check_text(key, texts)
        return tuple(texts)

    def check_text(self, key: str, texts: Sequence[str]) -> None:
        """JSON can spell halves of characters, which are no text."""
        if undecodable(texts):
            self.problem(key, "holds half a surrogate pair, which is no character")

    def only(self, key: str, accepted: Sequence[Any], why: str) -> None:
        """`key` is taken where its value changes nothing: None or one of `accepted`."""
        value = self.take(key)
        if value is not None and not any(value == other and type(value) is type(other) for other in accepted):
            self.problem(key, f"{why}; leave it out")

    def finish(self) -> None:
        for key in self._values:
            if key not in self._known:
                self.problem(key, f"no such field is known here{suggestion(key, self._known)}")
        if self._problems:
            raise ApiError(400, "; ".join(text for _, text in self._problems), parameter=self._problems[0][0])


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    # A whole number beyond all floats.
    except OverflowError:
        return False


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return str(value) if isinstance(value, float) or value.bit_length() < 100 else "a very large number"
    return "a text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"
