"""One unit of a preparation: some inputs in, shards and their accounts out, depending on nothing but the unit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.named_files import unsafe_file
from conf.stored_values import fits, misfits
from data_pipeline.corpus.files import hash_file, write_whole
from data_pipeline.corpus.input_list import is_input_line, sum_counts
from data_pipeline.corpus.manifest import canonical_json
from data_pipeline.corpus.shard_table import ShardEntry
from data_pipeline.corpus.shards import MAX_TOKENS, ShardBuilder
from data_pipeline.corpus.token_sequence import shard_metadata
from data_pipeline.errors import PrepareError
from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.preparing.progress import Meter
from data_pipeline.sources.source import FILE_LOST, Document, InputFile, Rejection, Source
from data_pipeline.tokenizing.encoders import Encoder
from data_pipeline.tokenizing.lost_text import LostText
from data_pipeline.tokenizing.tokenizer import Tokenizer

# Texts are tokenized together up to about this many bytes: fewer changes between reading and tokenizing keep the
# tokenizer's tables in the processor's caches.
BATCH_BYTES = 8 << 20
# Lines of the report that one unit writes at most; its counts are always complete.
REPORT_LINES = 1000
# Of these, documents of which the tokenizer lost something: they must not crowd out the rejected ones.
LOST_LINES = 100
_REPORT_KEYS = {"action": str, "file": str, "position": int, "reason": str, "detail": str}


@dataclass(frozen=True)
class UnitRecord:
    """What a finished unit wrote. `inputs`: a line of inputs.jsonl each; `report`: lines of report.jsonl."""

    unit: int
    # Library that encoded it.
    encoder: str
    shards: list[ShardEntry]
    inputs: list[dict[str, Any]]
    report: list[dict[str, Any]]

    def write(self, path: Path) -> None:
        """Write the record atomically: its unit is finished from then on."""
        text = canonical_json(dataclasses.asdict(self)) + "\n"
        write_whole(path, text.encode())

    @staticmethod
    def read(path: Path) -> UnitRecord | None:
        """The record in `path`; None when there is none that can be read."""
        try:
            fields = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        # Its unit is then done again.
        if misfits(UnitRecord, fields) or not all(map(is_input_line, fields["inputs"])):
            return None
        if not all(fits(line.get(key), kind) for line in fields["report"] for key, kind in _REPORT_KEYS.items()):
            return None
        record = UnitRecord(**{**fields, "shards": [ShardEntry(**entry) for entry in fields["shards"]]})
        is_foreign = any(unsafe_file(path, "shards.file", shard.file) for shard in record.shards)
        return None if is_foreign or not record.adds_up() else record

    def adds_up(self) -> bool:
        """Whether every record is accounted for."""
        documents = sum(entry["documents"] for entry in self.inputs)
        return documents == sum(shard.documents for shard in self.shards) and all(
            entry["records"] == entry["documents"] + sum(entry["rejected"].values()) for entry in self.inputs
        )


def cut_units(source: Source, inputs: list[InputFile], unit_bytes: int) -> list[list[InputFile]]:
    """Consecutive inputs of about `unit_bytes` in all; inputs of unknown size are units of their own.

    Larger inputs fall into parts where they can be entered in the middle, as Parquet files can.
    """
    units: list[list[InputFile]] = []
    filled = unit_bytes
    for item in (part for whole in inputs for part in source.parts(whole, unit_bytes)):
        if filled >= unit_bytes:
            units.append([])
            filled = 0
        units[-1].append(item)
        # A size of 0 is that of an empty file, or of what is no file at all.
        filled += unit_bytes if source.root is None else item.bytes_to_read
    return units


def run_unit(
    number: int,
    items: list[InputFile],
    source: Source,
    tokenizer: Tokenizer,
    encoder: Encoder,
    config: PrepareConfig,
    folder: Path,
    meter: Meter,
) -> UnitRecord:
    """Tokenize the documents of a unit into shards below `folder`.

    Raises PrepareError, and EncoderMismatchError from an encoder that is not equal to the reference.
    """
    spoiled: set[str] = set()
    while True:
        unit = _Unit(number, tokenizer, encoder, config, folder, meter)
        try:
            for place, item in enumerate(items):
                meter.begin_input(number, place)
                unit.begin(item)
                for record in source.read(item, meter.add_bytes):
                    unit.take(record, item.name in spoiled)
                unit.end(source.root, item)
            return unit.close()
        except _SpoiledInput as error:
            # Once more without it: what it gave may be in shards already.
            spoiled.add(str(error))
            meter.end_unit()


class _SpoiledInput(Exception):
    """An input that turned out to be damaged as a whole, by name."""


class _Unit:
    def __init__(
        self,
        number: int,
        tokenizer: Tokenizer,
        encoder: Encoder,
        config: PrepareConfig,
        folder: Path,
        meter: Meter,
    ):
        self._shards: list[ShardEntry] = []
        self._inputs: list[dict[str, Any]] = []
        self._report: list[dict[str, Any]] = []
        self._number = number
        self._tokenizer = tokenizer
        self._fingerprint = tokenizer.fingerprint
        self._encoder = encoder
        self._lost_text = LostText(tokenizer)
        self._shard_bytes = config.shard_bytes
        self._folder = folder
        self._meter = meter
        self._builders: dict[tuple[str, str], ShardBuilder] = {}
        self._ordinals: dict[tuple[str, str], int] = {}
        # Of the waiting documents only this is kept: their text as bytes, (split, source), and where they come from
        # (the counts of their input, position there).
        self._texts: list[bytes] = []
        self._keys: list[tuple[str, str]] = []
        self._places: list[tuple[dict[str, Any], int]] = []
        self._waiting_bytes = 0
        self._lost_lines = 0

    def begin(self, item: InputFile) -> None:
        """What follows comes from `item`."""
        self._counts: dict[str, Any] = {"file": item.name, "bytes": item.bytes, "xxh3_128": None}
        self._counts["row_groups"] = [item.part.first, item.part.end] if item.part else None
        self._counts |= {"unit": self._number, "records": 0, "documents": 0, "rejected": {}, "repaired": {}}
        self._inputs.append(self._counts)

    def take(self, record: Document | Rejection, spoiled: bool) -> None:
        """Account for a record; a document of a file that is not spoiled waits for the next `_flush`."""
        self._counts["records"] += 1
        if isinstance(record, Rejection):
            if record.whole_file and not spoiled:
                raise _SpoiledInput(record.file)
            self._note("rejected", record.position, record.reason, record.detail)
            return
        if spoiled:
            # Its file has one line in the report.
            _count(self._counts["rejected"], "damaged_archive")
            return
        if not record.text or record.text.isspace():
            self._note("rejected", record.position, "empty", "no text, or only white space")
            return
        if record.unlabelled:
            self._note("repaired", record.position, "no_source_label", f"no source label; counted as '{record.source}'")
        try:
            text = record.text.encode("utf-8")
        except UnicodeEncodeError:
            # Surrogates that form a pair become their character, the others U+FFFD.
            text = record.text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode("utf-8")
            self._note("repaired", record.position, "lone_surrogate", "replaced by U+FFFD")
        self._texts.append(text)
        self._keys.append((record.split, record.source))
        self._places.append((self._counts, record.position))
        self._waiting_bytes += len(text)
        if self._waiting_bytes >= BATCH_BYTES:
            self._flush()

    def end(self, root: Path | None, item: InputFile) -> None:
        """The input that `begin` named has been read. Its last documents may wait for those of the next."""
        if root is not None and item.lost is None:
            places = (item.part.start_byte, item.part.end_byte) if item.part else None
            self._counts["xxh3_128"] = hash_file(root / item.name, with_sha256=False, places=places).xxh3_128

    def _note(self, action: str, position: int, reason: str, detail: str, counts: dict[str, Any] | None = None) -> None:
        """Count and report what happened to a record of the present input, or of the one with these `counts`."""
        counts = counts or self._counts
        _count(counts[action], reason)
        self._add_line(action, position, reason, detail, counts)

    def _note_lost(self, position: int, lost: int, size: int, counts: dict[str, Any]) -> None:
        """Count and report that the tokenizer lost `lost` of the `size` bytes of a document that is written."""
        _count(counts.setdefault("lost", {}), "documents")
        _count(counts["lost"], "bytes", lost)
        self._lost_lines += 1
        if self._lost_lines <= LOST_LINES:
            detail = f"{lost} of {size} bytes have no token"
            self._add_line("lost", position, "no_token", detail, counts)

    def _add_line(self, action: str, position: int, reason: str, detail: str, counts: dict[str, Any]) -> None:
        if len(self._report) < REPORT_LINES:
            place = {"file": counts["file"], "position": position}
            self._report.append({"action": action, **place, "reason": reason, "detail": detail})

    def _flush(self) -> None:
        """Tokenize the waiting documents and hand them to their shards."""
        texts, keys, places = self._texts, self._keys, self._places
        self._texts, self._keys, self._places, self._waiting_bytes = [], [], [], 0
        if not texts:
            return
        ids, offsets = self._encoder.encode(texts)
        bounds = offsets.tolist()
        lost = self._lost_text.of_batch(texts, ids, offsets)
        written = 0
        start = 0
        for number, (text, key, end) in enumerate(zip(texts, keys, bounds[1:], strict=True)):
            counts, position = places[number]
            if start == end:
                self._note("rejected", position, "no_token", "the tokenizer makes no token of it", counts)
                continue
            if number in lost:
                self._note_lost(position, lost[number], len(text), counts)
            self._builder(key, end - start + 1, counts).add(ids[start:end], text)
            counts["documents"] += 1
            written += 1
            start = end
        self._meter.add_documents(written, len(ids) + written)

    def _builder(self, key: tuple[str, str], more_tokens: int, counts: dict[str, Any]) -> ShardBuilder:
        builder = self._builders.get(key)
        if builder is not None:
            if builder.token_bytes < self._shard_bytes and builder.tokens + more_tokens <= MAX_TOKENS:
                return builder
            self._write(key)
        if more_tokens > MAX_TOKENS:
            raise PrepareError(
                f"{counts['file']}: a document of {more_tokens} tokens does not fit a shard; lower "
                "data.max_record_bytes"
            )
        self._builders[key] = ShardBuilder(self._tokenizer.vocab_size, self._tokenizer.eod_id)
        return self._builders[key]

    def close(self) -> UnitRecord:
        """Write what is left; returns the record of the unit."""
        self._flush()
        for key in sorted(self._builders):
            self._write(key)
        self._shards.sort(key=lambda shard: (shard.split, shard.source, shard.file))
        record = UnitRecord(self._number, self._encoder.name, self._shards, self._inputs, self._report)
        assert record.adds_up()
        return record

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
        self._shards.append(dataclasses.replace(entry, **dataclasses.asdict(hashes)))


def _count(counts: dict[str, int], key: str, number: int = 1) -> None:
    counts[key] = counts.get(key, 0) + number


def _file_name(label: str) -> str:
    """`label` where it can be part of a file name, else something like it with a hash, so that two never meet."""
    plain = re.sub(r"[^A-Za-z0-9_.]", "_", label)[:80]
    if plain == label and not plain.startswith("."):
        return plain
    return f"{plain.lstrip('.')}.{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def unlabelled_documents(records: list[UnitRecord], label: str) -> int:
    """Documents of all units where none has a source label of its own, so that all count as `label`; else 0."""
    files = [entry for record in records for entry in record.inputs]
    documents = sum(entry["documents"] for entry in files)
    unlabelled = sum_counts(files, "repaired").get("no_source_label", 0)
    others = any(shard.source != label for record in records for shard in record.shards)
    return 0 if others or unlabelled < documents else documents


def lost_text(records: list[UnitRecord]) -> tuple[dict[str, int], float]:
    """What the tokenizer lost of the documents of some units, as `InputsEntry.lost`, and its share of their text."""
    sums = sum_counts([entry for record in records for entry in record.inputs], "lost")
    text_bytes = sum(shard.text_bytes for record in records for shard in record.shards)
    return sums, sums.get("bytes", 0) / max(1, text_bytes)


def losses(records: list[UnitRecord]) -> tuple[int, dict[str, int], Callable[[int], list[str]]]:
    """(records read, rejected by reason, function that gives the first n places of rejections) of some units."""
    files = [entry for record in records for entry in record.inputs]

    def places(count: int) -> list[str]:
        lines = [line for record in records for line in record.report if line["action"] == "rejected"]
        lines.sort(key=lambda line: line["reason"] not in FILE_LOST)
        return [str(Rejection(e["file"], e["position"], e["reason"], e["detail"])) for e in lines[:count]]

    return sum(entry["records"] for entry in files), sum_counts(files, "rejected"), places
