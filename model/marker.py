"""`complete.json`, the marker of a checkpoint: written last, it lists every other file with its size and checksum.

    {"format_version": 1, "attempt": "...", "files": {"state.json": {"bytes": 1913, "xxh3_128": "..."}, ...}}

A folder without it is no checkpoint, and a file that it does not list is none of the checkpoint's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from conf.named_files import unsafe_file
from conf.problems import is_later_format, other_format

COMPLETE = "complete.json"
FORMAT_VERSION = 1


class MarkerError(ValueError):
    """A marker that cannot be read as one; the message names its file."""


class LaterMarkerError(MarkerError):
    """A marker that a later version of this program wrote."""


@dataclass(frozen=True)
class Marker:
    """What the marker of a checkpoint says."""

    # Path in the checkpoint's folder -> {"bytes": size, "xxh3_128": checksum, hex}.
    files: dict[str, dict[str, int | str]]
    # The start of the run that wrote it; None where the marker does not say, as of version 0.2.0.
    attempt: str | None = None

    def files_in(self, part: str) -> list[str]:
        """Paths of the files in the folder `part` of the checkpoint, sorted."""
        return sorted(name for name in self.files if name.startswith(f"{part}/"))


def is_marked(folder: Path) -> bool:
    """Whether a marker is in `folder`, be it readable or not; also where that cannot be seen, as in a folder without
    permission: reading it then says what is wrong."""
    try:
        (folder / COMPLETE).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def read_marker(folder: Path) -> Marker:
    """The marker in the checkpoint `folder`, with names that lead to files of this folder alone.

    Raises LaterMarkerError for a later version's, MarkerError for whatever else is wrong with it; never waits, as
    opening a pipe of that name would.
    """
    path = folder / COMPLETE
    try:
        if not path.is_file():
            raise MarkerError(f"{path} cannot be read: it is {'no regular file' if path.exists() else 'missing'}")
        document = json.loads(path.read_bytes())
    except (OSError, RecursionError) as error:
        raise MarkerError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        if isinstance(error, MarkerError):
            raise
        raise MarkerError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise MarkerError(f"{path} cannot be read: it holds no JSON object")
    version = document.get("format_version")
    if problem := other_format(path, version, FORMAT_VERSION):
        raise (LaterMarkerError if is_later_format(version, FORMAT_VERSION) else MarkerError)(problem)
    files = document.get("files")
    if not isinstance(files, dict) or not all(map(_is_description, files.values())):
        raise MarkerError(f"{path} cannot be read: its 'files' do not give each file's size and checksum")
    for name in files:
        if problem := unsafe_file(path, "a key of files", name, folder):
            raise MarkerError(problem)
    attempt = document.get("attempt")
    return Marker(files, attempt if isinstance(attempt, str) else None)


def _is_description(found: object) -> bool:
    return (
        isinstance(found, dict)
        and found.keys() == {"bytes", "xxh3_128"}
        and type(found["bytes"]) is int
        and isinstance(found["xxh3_128"], str)
    )
