"""One unit of a preparation: some inputs in, shards and their accounts out, depending on nothing but the unit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config import PrepareConfig
from data_pipeline.corpus import check_shard_file, shard_metadata
from data_pipeline.errors import PrepareError
from data_pipeline.manifest import ShardEntry, canonical_json
from data_pipeline.progress import Progress
from data_pipeline.shards import MAX_TOKENS, ShardBuilder, hash_file
from data_pipeline.sources import Document, InputFile, Rejection, Source
from data_pipeline.tokenizer import Tokenizer

# Texts are tokenized together up to this many characters.
BATCH_CHARACTERS = 1 << 20
# Lines of the report that one unit writes at most; its counts are always complete.
REPORT_LINES = 1000


@dataclass(frozen=True)
class UnitRecord:
    """What a finished unit wrote. `inputs`: a line of inputs.jsonl each; `report`: lines of report.jsonl."""

    unit: int
    shards: list[ShardEntry]
    inputs: list[dict[str, Any]]
    report: list[dict[str, Any]]


def cut_units(inputs: list[InputFile], unit_bytes: int) -> list[list[InputFile]]:
    """Consecutive inputs of about `unit_bytes` in all; inputs of unknown size are units of their own."""
    units: list[list[InputFile]] = []
    filled = unit_bytes
    for item in inputs:
        if filled >= unit_bytes:
            units.append([])
            filled = 0
        units[-1].append(item)
        filled += item.bytes if item.bytes or item.split is None else unit_bytes
    return units


class Journal:
    """The finished units, one JSON line each, written through to the disk line by line."""

    def __init__(self, path: Path, folder: Path):
        self.records: dict[int, UnitRecord] = {}
        valid_bytes = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                record = _parse_record(line)
                if record is None:
                    break
                valid_bytes += len(line)
                if all(check_shard_file(folder, shard, with_hash=True) is None for shard in record.shards):
                    self.records[record.unit] = record
        self._file = open(path, "ab")  # noqa: SIM115
        self._file.truncate(valid_bytes)

    def append(self, record: UnitRecord) -> None:
        """Count a unit as finished."""
        self._file.write(canonical_json(dataclasses.asdict(record)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[record.unit] = record

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _parse_record(line: bytes) -> UnitRecord | None:
    """The record of a line; None for one that a kill cut short."""
    if not line.endswith(b"\n"):
        return None
    try:
        fields = json.loads(line)
        return UnitRecord(**{**fields, "shards": [ShardEntry(**entry) for entry in fields["shards"]]})
    except (ValueError, TypeError, KeyError):
        return None


def run_unit(
    number: int,
    items: list[InputFile],
    source: Source,
    tokenizer: Tokenizer,
    config: PrepareConfig,
    folder: Path,
    progress: Progress,
) -> UnitRecord:
    """Tokenize the documents of a unit into shards below `folder`. Raises PrepareError."""
    unit = _Unit(number, tokenizer, config, folder, progress)
    for item in items:
        unit.begin(item)
        for record in source.read(item, progress.add_bytes):
            unit.take(record)
        unit.flush()
        if source.root is not None:
            unit.counts["xxh3_128"] = hash_file(source.root / item.name, with_sha256=False).xxh3_128
    unit.close()
    return UnitRecord(number, unit.shards, unit.inputs, unit.report)


class _Unit:
    def __init__(self, number: int, tokenizer: Tokenizer, config: PrepareConfig, folder: Path, progress: Progress):
        self.shards: list[ShardEntry] = []
        self.inputs: list[dict[str, Any]] = []
        self.report: list[dict[str, Any]] = []
        self.counts: dict[str, Any] = {}
        self._number = number
        self._tokenizer = tokenizer
        self._fingerprint = tokenizer.fingerprint
        self._shard_bytes = config.shard_bytes
        self._folder = folder
        self._progress = progress
        self._builders: dict[tuple[str, str], ShardBuilder] = {}
        self._ordinals: dict[tuple[str, str], int] = {}
        self._waiting: list[Document] = []
        self._waiting_characters = 0

    def begin(self, item: InputFile) -> None:
        self.counts = {"file": item.name, "bytes": item.bytes, "xxh3_128": None, "unit": self._number}
        self.counts |= {"records": 0, "documents": 0, "rejected": {}, "repaired": {}}
        self.inputs.append(self.counts)

    def take(self, record: Document | Rejection) -> None:
        """Account for a record; a document is tokenized, with others, by the next `flush`."""
        self.counts["records"] += 1
        if isinstance(record, Document) and not record.text.strip():
            record = Rejection(record.file, record.position, "empty", "no text, or only white space")
        if isinstance(record, Rejection):
            self._note("rejected", record.file, record.position, record.reason, record.detail)
            return
        if record.unlabelled:
            detail = f"no source label; counted as '{record.source}'"
            self._note("repaired", record.file, record.position, "no_source_label", detail)
        self._waiting.append(self._without_lone_surrogates(record))
        self._waiting_characters += len(record.text)
        if self._waiting_characters >= BATCH_CHARACTERS:
            self.flush()

    def _without_lone_surrogates(self, document: Document) -> Document:
        try:
            document.text.encode("utf-8")
            return document
        except UnicodeEncodeError:
            # Surrogates that form a pair become their character, the others U+FFFD.
            text = document.text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            self._note("repaired", document.file, document.position, "lone_surrogate", "replaced by U+FFFD")
            return dataclasses.replace(document, text=text)

    def _note(self, action: str, file: str, position: int, reason: str, detail: str) -> None:
        self.counts[action][reason] = self.counts[action].get(reason, 0) + 1
        if len(self.report) < REPORT_LINES:
            line = {"action": action, "file": file, "position": position, "reason": reason, "detail": detail}
            self.report.append(line)

    def flush(self) -> None:
        """Tokenize the waiting documents, all of one input, and hand them to their shards."""
        documents, self._waiting, self._waiting_characters = self._waiting, [], 0
        for document, ids in zip(documents, self._tokenizer.encode_batch([d.text for d in documents]), strict=True):
            if len(ids) >= MAX_TOKENS:
                raise PrepareError(
                    f"{document.file}, record {document.position}: {len(ids)} tokens, too long a document"
                )
            if not len(ids):
                detail = "the tokenizer makes no token of it"
                self._note("rejected", document.file, document.position, "empty", detail)
                continue
            self._builder(document, len(ids) + 1).add(ids, document.text.encode("utf-8"))
            self.counts["documents"] += 1
            self._progress.add_document(len(ids) + 1)

    def _builder(self, document: Document, more_tokens: int) -> ShardBuilder:
        key = (document.split, document.source)
        builder = self._builders.get(key)
        if builder and (builder.token_bytes >= self._shard_bytes or builder.tokens + more_tokens > MAX_TOKENS):
            self._write(key)
        if key not in self._builders:
            self._builders[key] = ShardBuilder(self._tokenizer.vocab_size, self._tokenizer.eod_id)
        return self._builders[key]

    def close(self) -> None:
        for key in sorted(self._builders):
            self._write(key)
        self.shards.sort(key=lambda shard: (shard.split, shard.source, shard.file))
        for counts in self.inputs:
            assert counts["records"] == counts["documents"] + sum(counts["rejected"].values())

    def _write(self, key: tuple[str, str]) -> None:
        split, source = key
        builder = self._builders.pop(key)
        ordinal = self._ordinals.get(key, 0)
        self._ordinals[key] = ordinal + 1
        file = f"shards/{_file_name(split)}/{_file_name(source)}-{self._number:06d}-{ordinal:06d}.arrow"
        (self._folder / file).parent.mkdir(parents=True, exist_ok=True)
        entry = ShardEntry(
            file, split, source, self._number, builder.documents, builder.tokens, builder.text_bytes, 0, "", "", []
        )
        hashes = builder.write(self._folder / file, shard_metadata(entry, self._fingerprint))
        self.shards.append(dataclasses.replace(entry, **dataclasses.asdict(hashes)))


def _file_name(label: str) -> str:
    """`label` where it can be part of a file name, else something like it with a hash, so that two never meet."""
    plain = re.sub(r"[^A-Za-z0-9_.]", "_", label)[:80]
    if plain == label and not plain.startswith("."):
        return plain
    return f"{plain.lstrip('.')}.{hashlib.sha256(label.encode()).hexdigest()[:8]}"
