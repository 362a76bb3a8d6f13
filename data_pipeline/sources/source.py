"""A source of documents, which lists its inputs in a fixed order and reads each on its own, and what comes out of it.

What comes out of an input depends on nothing else. Every record comes out as a Document or as a Rejection.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.network import NetworkConfig
from data_pipeline.sources import columns
from data_pipeline.sources.config import DataConfig
from data_pipeline.sources.fields import describe_fields, look_up
from data_pipeline.sources.splits import split_by_name, split_by_text

OnBytes = Callable[[int], None]
# Reasons of rejections that lose an unknown number of records.
FILE_LOST = ("damaged_archive", "unreadable_input", "memory_limit")


class Document(NamedTuple):
    """One text. `position`: its line (JSON lines) or row in `file`, from 1; 0: the file as a whole."""

    text: str
    source: str
    split: str
    file: str
    position: int
    # The record named no source, or none that is text, so that `source` is the configured label.
    unlabelled: bool = False


class Rejection(NamedTuple):
    """A record that gives no document, and why."""

    file: str
    position: int
    reason: str
    detail: str
    # What came from the file before is not to be used either.
    whole_file: bool = False

    @property
    def loses_a_file(self) -> bool:
        """Whether an unknown number of records is lost with it, which `tolerance.damaged_files` bounds."""
        return self.reason in FILE_LOST

    def __str__(self) -> str:
        record = f", record {self.position}" if self.position else ""
        return f"{self.file}{record}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class InputFile:
    """One input. `name`: relative, with '/'. `bytes`: size on disk (0: unknown). `split`: where it is given."""

    name: str
    bytes: int
    split: str | None = None
    # Only these row groups of it; None: all of it.
    part: columns.RowGroups | None = None
    # All that comes of what cannot be read, such as a link to nothing; its size is then 0.
    lost: Rejection | None = None

    @property
    def bytes_to_read(self) -> int:
        return self.part.bytes if self.part else self.bytes


class Source(abc.ABC):
    """Where documents come from."""

    # Folder below which the inputs lie; None when they are no local files.
    root: Path | None = None

    def __init__(self, config: DataConfig):
        self.config = config
        # Of a source that reads over one.
        self.network = NetworkConfig()

    @abc.abstractmethod
    def inputs(self) -> list[InputFile]:
        """All inputs in their fixed order. Raises PrepareError when there are none."""

    @abc.abstractmethod
    def read(self, item: InputFile, on_bytes: OnBytes) -> Iterator[Document | Rejection]:
        """The records of one input in order; `on_bytes` is told how much of it has been read."""

    def first_record(self, inputs: list[InputFile]) -> dict[str, Any] | None:
        """The first record that can be read, with all its fields; None where there is none, or records have none."""
        return None

    def why_unlabelled(self, inputs: list[InputFile]) -> str | None:
        """What the first record has instead of the source label that was asked for; None where it has one."""
        if not self.config.source_field or (record := self.first_record(inputs)) is None:
            return None
        label = look_up(record, self.config.source_field)
        if _is_label(label):
            return None
        found = f"no text in data.source_field={self.config.source_field}"
        if label is not None:
            found += f" ({_kind(label).removeprefix('of ')})"
        return f"{found}; its fields are: {describe_fields(record)}"

    def parts(self, item: InputFile, part_bytes: int) -> list[InputFile]:
        """`item`, or what it falls into where it is larger than `part_bytes` and can be entered in its middle."""
        return [item]

    def document(self, item: InputFile, text: str, position: int, label: Any = None) -> Document | Rejection:
        if len(text) > self.config.max_record_bytes:
            return self._too_large(item, position, f"{len(text)} characters")
        split = item.split
        if split is None:
            by_document = self.config.split.unit == "document"
            split = (
                split_by_text(text, self.config.split) if by_document else split_by_name(item.name, self.config.split)
            )
        if _is_label(label):
            return Document(text, label, split, item.name, position)
        return Document(text, self.config.source, split, item.name, position, self.config.source_field is not None)

    def _too_large(self, item: InputFile, position: int, size: str) -> Rejection:
        detail = f"{size}, data.max_record_bytes is {self.config.max_record_bytes}"
        return Rejection(item.name, position, "too_large", detail)

    def from_record(self, item: InputFile, record: Any, position: int) -> Document | Rejection:
        """The document of a record with fields."""
        if isinstance(record, UnicodeDecodeError):
            return Rejection(item.name, position, "not_utf8", f"byte {record.start} of a field: {record.reason}")
        if isinstance(record, columns.OversizedText):
            return self._too_large(item, position, f"{record.characters} characters")
        if not isinstance(record, dict):
            return Rejection(item.name, position, "malformed", f"not a record with fields but {_kind(record)}")
        text = record.get(self.config.text_field)
        if not isinstance(text, str):
            found = f"it is {_kind(text)}"
            if self.config.text_field not in record:
                found = f"no such field; the record's are: {describe_fields(record)}"
            return Rejection(item.name, position, "no_text", f"field '{self.config.text_field}': {found}")
        label = look_up(record, self.config.source_field) if self.config.source_field else None
        return self.document(item, text, position, label)


def _is_label(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:
        # A lone surrogate, which neither a shard nor a file's name can hold.
        return False


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", bool: "true or false", type(None): "null", str: "a string"}
    names |= dict.fromkeys((int, float), "a number")
    # Columns hold more than JSON does.
    return names.get(type(value), f"of type {type(value).__name__}")
