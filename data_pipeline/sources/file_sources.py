"""Documents from files below a folder: text trees, the standard library, and records of JSON lines, Parquet and Arrow.

Files are listed in a fixed order, in which numbers in names compare as numbers.
"""

from __future__ import annotations

import abc
import fnmatch
import functools
import json
import os
import re
import stat
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import PrepareError
from data_pipeline.sources import columns
from data_pipeline.sources.archives import DamagedArchiveError, MemoryLimitError, OversizedLine, read_lines
from data_pipeline.sources.config import DataConfig
from data_pipeline.sources.json_size import MOST_BYTES, parsed_bytes
from data_pipeline.sources.source import Document, InputFile, OnBytes, Rejection, Source
from data_pipeline.sources.splits import given_split


def _parse_json(line: bytes | memoryview) -> Any:
    """What the standard library makes of a line; integers become floats, which have no limit of digits.

    Raises ValueError.
    """
    try:
        return json.loads(bytes(line), parse_int=float)
    except RecursionError:
        raise ValueError("nested too deeply") from None


parse_json_fast: Callable[[bytes | memoryview], Any]
try:
    import msgspec.json
except ImportError:
    parse_json_fast = _parse_json
else:
    # About three times as fast. What it refuses (lone surrogates, NaN, deep nesting) goes to the function above.
    parse_json_fast = msgspec.json.decode


# What may lie in a folder and is no regular file.
SPECIAL_FILES = {
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a folder",
}


JSON_ARRAY = (
    "a JSON array, where JSON lines have one object {...} a line, without commas between them (`jq -c '.[]' FILE` "
    "converts an array)"
)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key by which chunk2 comes before chunk10."""
    parts = re.split(r"(\d+)", name)
    # Numbers are at the odd places. `isdigit` would take a superscript for one, of which int() makes none.
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


_RECORD_ENDINGS = {".jsonl": "jsonl", ".parquet": "parquet", ".arrow": "records"}


class FileSource(Source):
    """Inputs that are files below a folder."""

    root: Path
    # Reason for a file that cannot be read.
    unreadable: str

    def __init__(self, config: DataConfig):
        super().__init__(config)
        path = Path(config.path) if config.path else Path(sysconfig.get_path("stdlib"))
        if not path.exists():
            raise PrepareError(f"{path}: no such file or folder; set data.path")
        self.root = path if path.is_dir() else path.parent
        self._only = None if path.is_dir() else path.name

    def inputs(self) -> list[InputFile]:
        found = [self._look(self._only)] if self._only else list(self._walk(self.root))
        if not found:
            raise PrepareError(f"{self.root}: no file matches data.files={self.config.files}; change data.path or it")
        return sorted(found, key=lambda item: natural_key(item.name))

    def read(self, item: InputFile, on_bytes: OnBytes) -> Iterator[Document | Rejection]:
        return iter([item.lost]) if item.lost else self.read_file(item, on_bytes)

    @abc.abstractmethod
    def read_file(self, item: InputFile, on_bytes: OnBytes) -> Iterator[Document | Rejection]:
        """`read`, of an input that could be read when it was listed."""

    def _walk(self, folder: Path, above: tuple[str, ...] = ()) -> Iterator[InputFile]:
        """The files to read; folders that are symbolic links are gone through too, but not in circles."""
        real = os.path.realpath(folder)
        if real in above:
            return
        name = folder.relative_to(self.root).as_posix()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            if not above:
                raise PrepareError(f"{folder}: cannot be listed ({error.strerror}); set data.path") from None
            yield _lost(name, "unreadable_input", f"a folder that cannot be listed ({error.strerror})")
            return
        nothing = True
        entries = [entry for entry in entries if not self._excluded(entry.name)]
        for entry in entries:
            if _is_folder(entry):
                below = self._walk(folder / entry.name, (*above, real))
            else:
                inside = (folder / entry.name).relative_to(self.root).as_posix()
                below = iter([self._look(inside)] if self._asked_for(inside) else [])
            for item in below:
                nothing = False
                yield item
        if nothing and entries and above and self._asked_for(name):
            yield _lost(name, "unreadable_input", "a folder whose name matches data.files, but no file in it does")

    def _look(self, name: str) -> InputFile:
        """The input of this name, with what keeps it from being read."""
        path = self.root / name
        try:
            status = path.stat()
        except OSError as error:
            what = f"a link to {os.readlink(path)}: {error.strerror}" if os.path.islink(path) else error.strerror
            return _lost(name, self.unreadable, f"cannot be opened ({what})")
        if not stat.S_ISREG(status.st_mode):
            what = SPECIAL_FILES.get(stat.S_IFMT(status.st_mode), "of an unknown type")
            return _lost(name, self.unreadable, f"no regular file but {what}")
        if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            return _lost(name, self.unreadable, "may not be read by this user (Permission denied)")
        return InputFile(name, status.st_size, given_split(name) if self.config.split.rule == "given" else None)

    def _asked_for(self, name: str) -> bool:
        return any(_matches(name, pattern) for pattern in self.config.files)

    def _excluded(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.config.exclude)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself, or into a folder that this user may not enter.
        return False


def _lost(name: str, reason: str, detail: str) -> InputFile:
    return InputFile(name, 0, lost=Rejection(name, 0, reason, detail))


def _matches(name: str, pattern: str) -> bool:
    """Whether a relative name matches a pattern, in which `**/` also stands for no folder at all."""
    return any(fnmatch.fnmatchcase(name, spelling) for spelling in _spellings(pattern))


@functools.lru_cache
def _spellings(pattern: str) -> list[str]:
    """`pattern` with and without each of its `**/`."""
    first, *rest = re.split(r"(?<![^/])\*\*/", pattern)
    spellings = [first]
    for part in rest:
        spellings = [beginning + folders + part for beginning in spellings for folders in ("", "**/")]
    return spellings


class TextSource(FileSource):
    """Each file is one document, in UTF-8, kept exactly. Also the standard library."""

    unreadable = "unreadable_document"

    def __init__(self, config: DataConfig):
        super().__init__(config)
        endings = set(Path(self._only or "").suffixes)
        if fitting := next((kind for ending, kind in _RECORD_ENDINGS.items() if ending in endings), None):
            raise PrepareError(
                f"{config.path}: data.kind=text would take this file of records as one document; use data={fitting}, "
                "or name its folder and say data.files=..."
            )

    def read_file(self, item: InputFile, on_bytes: OnBytes) -> Iterator[Document | Rejection]:
        with open(self.root / item.name, "rb") as file:
            # Files of /proc and those that grow have more than their size says.
            data = file.read(self.config.max_record_bytes + 1)
            size = max(len(data), os.fstat(file.fileno()).st_size)
        if size > self.config.max_record_bytes:
            yield self._too_large(item, 0, f"{size} bytes")
            return
        on_bytes(len(data))
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            yield Rejection(item.name, 0, "not_utf8", f"byte {error.start}: {error.reason}")
            return
        yield self.document(item, text, 0)


class RecordSource(FileSource):
    """Files of records with fields: JSON lines, Parquet or Arrow, or what each file's ending says."""

    unreadable = "unreadable_input"

    def _kind(self, item: InputFile) -> str:
        if self.config.kind == "records":
            return {".parquet": "parquet", ".arrow": "arrow"}.get(Path(item.name).suffix, "jsonl")
        return self.config.kind

    def first_record(self, inputs: list[InputFile]) -> dict[str, Any] | None:
        records = (self._first_of(item) for item in inputs if not item.lost)
        return next((record for record in records if record is not None), None)

    def _first_of(self, item: InputFile) -> dict[str, Any] | None:
        path, kind = self.root / item.name, self._kind(item)
        try:
            if kind != "jsonl":
                return columns.first_record(path, kind, self.config.max_reader_bytes)
            for line in self._lines(item, lambda count: None):
                record = None if isinstance(line, OversizedLine) or self._excess(line) else _object(line)
                if record is not None:
                    return record
        except (DamagedArchiveError, MemoryLimitError, *columns.DAMAGE):
            # Reading it says so.
            pass
        return None

    def parts(self, item: InputFile, part_bytes: int) -> list[InputFile]:
        if item.bytes <= part_bytes or self._kind(item) != "parquet":
            return [item]
        runs = columns.cut_row_groups(self.root / item.name, part_bytes)
        return [replace(item, part=run) for run in runs] or [item]

    def read_file(self, item: InputFile, on_bytes: OnBytes) -> Iterator[Document | Rejection]:
        kind = self._kind(item)
        if kind == "jsonl":
            return self._read_json_lines(item, on_bytes)
        if kind == "arrow":
            return self._read_columns(item, on_bytes, columns.read_arrow)
        return self._read_columns(item, on_bytes, functools.partial(columns.read_parquet, part=item.part))

    def _lines(self, item: InputFile, on_bytes: OnBytes) -> Iterator[bytes | memoryview | OversizedLine]:
        config = self.config
        return read_lines(self.root / item.name, config.max_record_bytes, config.max_reader_bytes, on_bytes)

    def _excess(self, line: bytes | memoryview) -> int:
        """Memory that a line would take, parsed, where that is more than it may; else 0."""
        allowed = self.config.max_reader_bytes
        size = parsed_bytes(line) if len(line) * MOST_BYTES > allowed else 0
        return size if size > allowed else 0

    def _read_json_lines(self, item: InputFile, on_bytes: OnBytes) -> Iterator[Document | Rejection]:
        position = 0
        try:
            for line in self._lines(item, on_bytes):
                position += 1
                yield self._parse(item, line, position)
        except DamagedArchiveError as error:
            detail = f"{error}; nothing of the file is used"
            yield Rejection(item.name, position + 1, "damaged_archive", detail, whole_file=True)
        except MemoryLimitError as error:
            detail = f"{error}; nothing of the file is used"
            yield Rejection(item.name, position + 1, "memory_limit", detail, whole_file=True)

    def _parse(self, item: InputFile, line: bytes | memoryview | OversizedLine, position: int) -> Document | Rejection:
        if isinstance(line, OversizedLine):
            return self._too_large(item, position, f"a line of {line.bytes} bytes")
        if size := self._excess(line):
            detail = f"its fields take {size} bytes of memory, data.max_reader_bytes is {self.config.max_reader_bytes}"
            return Rejection(item.name, position, "too_large", detail)
        try:
            record = parse_json_fast(line)
        except (ValueError, RecursionError):
            try:
                record = _parse_json(line)
            except ValueError as error:
                return _not_json(item, bytes(line), position, error)
        if isinstance(record, list):
            return Rejection(item.name, position, "malformed", JSON_ARRAY)
        return self.from_record(item, record, position)

    def _read_columns(
        self, item: InputFile, on_bytes: OnBytes, read: Callable[..., Iterator[tuple[Iterator[columns.Record], float]]]
    ) -> Iterator[Document | Rejection]:
        position = 0
        told = 0
        try:
            if item.part:
                position = columns.first_row(self.root / item.name, item.part)
            for records, share in read(self.root / item.name, item.name, self.config):
                for record in records:
                    if isinstance(record, columns.LostRows):
                        detail = f"{record.error}; its {record.rows} rows are lost"
                        yield Rejection(item.name, position + 1, "memory_limit", detail)
                        position += record.rows
                        continue
                    position += 1
                    yield self.from_record(item, record, position)
                done = int(item.bytes_to_read * share)
                on_bytes(done - told)
                told = done
            on_bytes(item.bytes_to_read - told)
        except MemoryLimitError as error:
            yield Rejection(item.name, position + 1, "memory_limit", f"{error}; what follows is lost")
        except columns.DAMAGE as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            where = f" in row groups {item.part.first} to {item.part.end - 1}" if item.part else ""
            detail = f"{first_line}; what follows{where} is lost"
            yield Rejection(item.name, position + 1, "damaged_archive", detail)


def _object(line: bytes | memoryview) -> dict[str, Any] | None:
    try:
        record = _parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _not_json(item: InputFile, line: bytes, position: int, error: ValueError) -> Rejection:
    if not line.strip():
        return Rejection(item.name, position, "empty", "a blank line")
    if isinstance(error, UnicodeDecodeError):
        return Rejection(item.name, position, "not_utf8", f"byte {error.start} of the line: {error.reason}")
    if position == 1 and line.lstrip().startswith(b"["):
        return Rejection(item.name, position, "malformed", JSON_ARRAY)
    return Rejection(item.name, position, "malformed", f"not JSON: {error}")
