"""Documents from text trees, JSON lines, Parquet, Arrow, Hugging Face data sets and Python's standard library.

A source lists its inputs in a fixed order (numbers in names compare as numbers) and reads each one on its own, so that
what comes out of an input depends on nothing else. Every record comes out as a Document or as a Rejection.
"""

from __future__ import annotations

import abc
import fnmatch
import functools
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from data_pipeline.errors import PrepareError
from data_pipeline.sources import columns
from data_pipeline.sources.archives import DamagedArchiveError, OversizedLine, read_lines
from data_pipeline.sources.config import DataConfig, SplitConfig

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
OnBytes = Callable[[int], None]


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


@dataclass(frozen=True)
class InputFile:
    """One input. `name`: relative, with '/'. `bytes`: size on disk (0: unknown). `split`: where it is given."""

    name: str
    bytes: int
    split: str | None = None
    # Only these row groups of it; None: all of it.
    part: columns.RowGroups | None = None

    @property
    def bytes_to_read(self) -> int:
        return self.part.bytes if self.part else self.bytes


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


class Source(abc.ABC):
    """Where documents come from."""

    # Folder below which the inputs lie; None when they are no local files.
    root: Path | None = None

    def __init__(self, config: DataConfig):
        self.config = config
        self._label_path = config.source_field.split(".") if config.source_field else []

    @abc.abstractmethod
    def inputs(self) -> list[InputFile]:
        """All inputs in their fixed order. Raises PrepareError when there are none."""

    @abc.abstractmethod
    def read(self, item: InputFile, on_bytes: OnBytes) -> Iterator[Document | Rejection]:
        """The records of one input in order; `on_bytes` is told how much of it has been read."""

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
        if not isinstance(record, dict):
            return Rejection(item.name, position, "malformed", f"not a record with fields but {_kind(record)}")
        text = record.get(self.config.text_field)
        if not isinstance(text, str):
            found = "no such field" if self.config.text_field not in record else f"it is {_kind(text)}"
            return Rejection(item.name, position, "no_text", f"field '{self.config.text_field}': {found}")
        label = look_up(record, self._label_path) if self._label_path else None
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


def split_by_name(name: str, split: SplitConfig) -> str:
    """The split of a file: a pure function of its name and of `split.seed`."""
    key = json.dumps([split.seed, name], ensure_ascii=True)
    return _split_at(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64, split)


def split_by_text(text: str, split: SplitConfig) -> str:
    """The split of a document: a pure function of its text and of `split.seed`, which prefixes what is hashed."""
    digest = xxhash.xxh3_64(f"{split.seed} ".encode())
    digest.update(text.encode("utf-8", "surrogatepass"))
    return _split_at(digest.intdigest() / 2**64, split)


def _split_at(share: float, split: SplitConfig) -> str:
    if share < split.validation_fraction:
        return "validation"
    return "test" if share < split.validation_fraction + split.test_fraction else "train"


def look_up(record: dict[str, Any], path: list[str]) -> Any:
    """The value at the end of nested fields; a string on the way is read as JSON (`meta` of some SlimPajama copies)."""
    value: Any = record
    for part in path:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                return None
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key by which chunk2 comes before chunk10."""
    parts = re.split(r"(\d+)", name)
    # Numbers are at the odd places. `isdigit` would take a superscript for one, of which int() makes none.
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


class FileSource(Source):
    """Inputs that are files below a folder."""

    root: Path

    def __init__(self, config: DataConfig):
        super().__init__(config)
        path = Path(config.path) if config.path else Path(sysconfig.get_path("stdlib"))
        if not path.exists():
            raise PrepareError(f"{path}: no such file or folder; set data.path")
        self.root = path if path.is_dir() else path.parent
        self._only = None if path.is_dir() else path.name

    def inputs(self) -> list[InputFile]:
        names = [self._only] if self._only else sorted(self._walk(self.root), key=natural_key)
        if not names:
            raise PrepareError(f"{self.root}: no file matches data.files={self.config.files}; change data.path or it")
        given = self.config.split.rule == "given"
        return [
            InputFile(name, (self.root / name).stat().st_size, given_split(name) if given else None) for name in names
        ]

    def _walk(self, folder: Path, above: tuple[str, ...] = ()) -> Iterator[str]:
        """Names of the files to read; folders that are symbolic links are gone through too, but not in circles."""
        real = os.path.realpath(folder)
        if real in above:
            return
        for entry in list(os.scandir(folder)):
            if self._excluded(entry.name):
                continue
            if entry.is_dir():
                yield from self._walk(folder / entry.name, (*above, real))
                continue
            name = (folder / entry.name).relative_to(self.root).as_posix()
            if any(_matches(name, pattern) for pattern in self.config.files):
                yield name

    def would_read(self, path: Path) -> bool:
        """Whether a file would be an input if it were at `path`."""
        name = os.path.relpath(os.path.realpath(path), os.path.realpath(self.root))
        parts = name.split("/")
        if self._only or parts[0] == ".." or any(map(self._excluded, parts)):
            return False
        return any(_matches(name, pattern) for pattern in self.config.files)

    def _excluded(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.config.exclude)


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


def given_split(name: str) -> str:
    """The split that a relative name spells: a folder `train/...`, or a file `validation-00000.parquet`."""
    for part in name.split("/"):
        word = re.split(r"[-_.]", part)[0].lower()
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    raise PrepareError(
        f"{name}: neither a folder nor the file's name says train, validation or test; sort the files into such "
        "folders or set data.split.rule=hash"
    )


class TextSource(FileSource):
    """Each file is one document, in UTF-8, kept exactly. Also the standard library."""

    def read(self, item: InputFile, on_bytes: OnBytes) -> Iterator[Document | Rejection]:
        path = self.root / item.name
        if path.stat().st_size > self.config.max_record_bytes:
            yield self._too_large(item, 0, f"{path.stat().st_size} bytes")
            return
        data = path.read_bytes()
        on_bytes(len(data))
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            yield Rejection(item.name, 0, "not_utf8", f"byte {error.start}: {error.reason}")
            return
        yield self.document(item, text, 0)


class RecordSource(FileSource):
    """Files of records with fields: JSON lines, Parquet or Arrow, or what each file's ending says."""

    def _kind(self, item: InputFile) -> str:
        if self.config.kind == "records":
            return {".parquet": "parquet", ".arrow": "arrow"}.get(Path(item.name).suffix, "jsonl")
        return self.config.kind

    def parts(self, item: InputFile, part_bytes: int) -> list[InputFile]:
        if item.bytes <= part_bytes or self._kind(item) != "parquet":
            return [item]
        runs = columns.cut_row_groups(self.root / item.name, part_bytes)
        return [replace(item, part=run) for run in runs] or [item]

    def read(self, item: InputFile, on_bytes: OnBytes) -> Iterator[Document | Rejection]:
        kind = self._kind(item)
        if kind == "jsonl":
            return self._read_json_lines(item, on_bytes)
        if kind == "arrow":
            return self._read_columns(item, on_bytes, columns.read_arrow)
        return self._read_columns(item, on_bytes, functools.partial(columns.read_parquet, part=item.part))

    def _read_json_lines(self, item: InputFile, on_bytes: OnBytes) -> Iterator[Document | Rejection]:
        position = 0
        try:
            for line in read_lines(self.root / item.name, self.config.max_record_bytes, on_bytes):
                position += 1
                yield self._parse(item, line, position)
        except DamagedArchiveError as error:
            detail = f"{error}; nothing of the file is used"
            yield Rejection(item.name, position + 1, "damaged_archive", detail, whole_file=True)

    def _parse(self, item: InputFile, line: bytes | memoryview | OversizedLine, position: int) -> Document | Rejection:
        if isinstance(line, OversizedLine):
            return self._too_large(item, position, f"a line of {line.bytes} bytes")
        try:
            record = parse_json_fast(line)
        except (ValueError, RecursionError):
            try:
                record = _parse_json(line)
            except ValueError as error:
                return _not_json(item, bytes(line), position, error)
        return self.from_record(item, record, position)

    def _read_columns(
        self, item: InputFile, on_bytes: OnBytes, read: Callable[..., Iterator[tuple[list[columns.Record], float]]]
    ) -> Iterator[Document | Rejection]:
        position = 0
        told = 0
        try:
            if item.part:
                position = columns.first_row(self.root / item.name, item.part)
            for records, share in read(self.root / item.name, item.name, self.config):
                for record in records:
                    position += 1
                    yield self.from_record(item, record, position)
                done = int(item.bytes_to_read * share)
                on_bytes(done - told)
                told = done
            on_bytes(item.bytes_to_read - told)
        except columns.DAMAGE as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            where = f" in row groups {item.part.first} to {item.part.end - 1}" if item.part else ""
            detail = f"{first_line}; what follows{where} is lost"
            yield Rejection(item.name, position + 1, "damaged_archive", detail)


def _not_json(item: InputFile, line: bytes, position: int, error: ValueError) -> Rejection:
    if not line.strip():
        return Rejection(item.name, position, "empty", "a blank line")
    if isinstance(error, UnicodeDecodeError):
        return Rejection(item.name, position, "not_utf8", f"byte {error.start} of the line: {error.reason}")
    return Rejection(item.name, position, "malformed", f"not JSON: {error}")


class DatasetsSource(Source):
    """Anything that the `datasets` library streams, by name or from a folder (also one of `save_to_disk`)."""

    def __init__(self, config: DataConfig):
        super().__init__(config)
        self._splits = self._open()

    def _open(self) -> dict[str, Any]:
        import datasets

        path = self.config.path
        if path is None:
            raise PrepareError("data.path: kind=datasets needs a name or a folder; set source=datasets:NAME")
        try:
            if any((Path(path) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
                loaded = datasets.load_from_disk(path)
            else:
                loaded = datasets.load_dataset(
                    path, name=self.config.subset, revision=self.config.revision, streaming=True
                )
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            raise PrepareError(
                f"data.path={path}: the datasets library cannot open it ({type(error).__name__}: {first_line}); "
                "check the name, the network, and data.subset and data.revision"
            ) from None
        return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}

    def inputs(self) -> list[InputFile]:
        given = self.config.split.rule == "given"
        items = []
        for split in sorted(self._splits):
            count = self._shard_count(split)
            name = SPLIT_NAMES.get(split.lower(), split) if given else None
            items += [InputFile(f"{split}/{i:05d}-of-{count:05d}", 0, name) for i in range(count)]
        return items

    def _shard_count(self, split: str) -> int:
        return getattr(self._splits[split], "num_shards", 1)

    def read(self, item: InputFile, on_bytes: OnBytes) -> Iterator[Document | Rejection]:
        split, part = item.name.rsplit("/", 1)
        dataset = self._splits[split]
        if self._shard_count(split) > 1:
            dataset = dataset.shard(num_shards=self._shard_count(split), index=int(part.split("-")[0]))
        position = 0
        try:
            for record in dataset:
                position += 1
                yield self.from_record(item, record, position)
        except Exception as error:
            # Stops the unit: a stream that broke may be whole at the next try.
            raise PrepareError(
                f"{item.name}: the stream broke after row {position} ({type(error).__name__}: {error}); run again"
            ) from error


def open_source(config: DataConfig) -> Source:
    """The source that `config` describes. Raises PrepareError when it cannot be reached."""
    kinds: dict[str, type[Source]] = {
        "standard_library": TextSource,
        "text": TextSource,
        "jsonl": RecordSource,
        "parquet": RecordSource,
        "arrow": RecordSource,
        "records": RecordSource,
        "datasets": DatasetsSource,
    }
    return kinds[config.kind](config)
