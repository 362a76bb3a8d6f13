"""A JSON lines file of what was measured at steps: each step stands in it once, however often the run resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from train.run_directory import read_lines, write_atomically


class StepLines:
    """A file whose first line is a header and whose others have a `step`. Lines are on disk as soon as appended."""

    def __init__(self, path: Path, header: dict[str, Any], step: int):
        """Go on after `step`: what stands in the file of later ones, which are taken again, is removed."""
        lines = (line for line in read_lines(path) if line != header and isinstance(line.get("step"), int))
        kept = [line for line in lines if 0 < line["step"] <= step]
        write_atomically(path, "".join(_as_line(line) for line in [header, *kept]))
        self._file = path.open("a", encoding="utf-8")

    def append(self, line: dict[str, Any]) -> None:
        """Write one line; numbers that are not finite become null. Raises OSError that names the file."""
        try:
            self._file.write(_as_line(line))
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None

    def close(self) -> None:
        """Nothing can be appended any more."""
        self._file.close()


def _as_line(line: dict[str, Any]) -> str:
    return json.dumps(_finite(line), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
