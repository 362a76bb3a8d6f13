"""`manifest.json`: what a prepared corpus consists of, with sizes and checksums; the corpus' identity is its hash.

Written last and atomically: a folder without a manifest is not a corpus. It holds no clock time, no host name and no
absolute path: the same input and settings give the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import CorpusError
from data_pipeline.shards import write_atomically

FORMAT = "xlstm-pretrain corpus"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class TokenizerEntry:
    """The corpus' own copy of its tokenizer and what identifies it."""

    file: str
    kind: str
    sha256: str
    fingerprint: str
    library: str
    library_version: str
    vocab_size: int
    eod_id: int
    eod_token: str
    probe_sha256: str


@dataclass(frozen=True)
class ShardEntry:
    """One shard: what it holds and the checksums of its file."""

    file: str
    split: str
    source: str
    unit: int
    documents: int
    tokens: int
    text_bytes: int
    bytes: int
    sha256: str
    xxh3_128: str
    xxh3_64_blocks: list[str]


@dataclass(frozen=True)
class InputsEntry:
    """`inputs.jsonl` (one line an input file), and its sums: records = documents + all rejected."""

    file: str
    sha256: str
    files: int
    records: int
    documents: int
    rejected: dict[str, int]
    repaired: dict[str, int]


@dataclass(frozen=True)
class ReportEntry:
    """`report.jsonl`: one line for each record rejected or repaired (the first of each unit), and its hash."""

    file: str
    sha256: str
    lines: int


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. `splits`: split -> source -> {"documents", "tokens", "text_bytes"}, sums over `shards`."""

    settings: dict[str, Any]
    tokenizer: TokenizerEntry
    token_dtype: str
    block_bytes: int
    splits: dict[str, dict[str, dict[str, int]]]
    shards: list[ShardEntry]
    inputs: InputsEntry
    report: ReportEntry
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of everything above."""
        return hashlib.sha256(canonical_json(dataclasses.asdict(self)).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder` atomically."""
        document = {**dataclasses.asdict(self), "fingerprint": self.fingerprint}
        text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=True) + "\n"
        write_atomically(folder / MANIFEST_FILE, lambda put: put(text.encode()))

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read and check `manifest.json`. Raises CorpusError when it is missing, altered or of another version."""
        path = folder / MANIFEST_FILE
        if not folder.is_dir():
            raise CorpusError(f"{folder}: no such folder; prepare a corpus with `python -m data_pipeline prepare`")
        if not path.is_file():
            raise CorpusError(
                f"{folder}: no {MANIFEST_FILE}, so not a finished corpus; run (again) "
                f"`python -m data_pipeline prepare ... output={folder}`"
            )
        try:
            document = json.loads(path.read_bytes())
        except ValueError as error:
            raise CorpusError(f"{path}: altered or damaged, not JSON ({error}); {_ADVICE}") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CorpusError(f"{path}: not a corpus manifest (its 'format' is not '{FORMAT}')")
        if document.get("format_version") != FORMAT_VERSION:
            raise CorpusError(
                f"{path}: format_version {document.get('format_version')}, but this code reads {FORMAT_VERSION}; "
                "prepare the corpus again or use the release that wrote it"
            )
        recorded = document.pop("fingerprint", None)
        if hashlib.sha256(canonical_json(document).encode()).hexdigest() != recorded:
            raise CorpusError(f"{path}: altered after it was written (its fingerprint does not match); {_ADVICE}")
        try:
            return _from_document(document)
        except (TypeError, KeyError) as error:
            raise CorpusError(f"{path}: keys missing or unknown ({error}); {_ADVICE}") from None


_ADVICE = "restore the file or prepare the corpus again"


def _from_document(document: dict[str, Any]) -> Manifest:
    parts = {
        "tokenizer": TokenizerEntry(**document.pop("tokenizer")),
        "shards": [ShardEntry(**entry) for entry in document.pop("shards")],
        "inputs": InputsEntry(**document.pop("inputs")),
        "report": ReportEntry(**document.pop("report")),
    }
    return Manifest(**document, **parts)


def canonical_json(value: Any) -> str:
    """The one spelling of `value` that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def summarise(shards: list[ShardEntry]) -> dict[str, dict[str, dict[str, int]]]:
    """Documents, tokens and text bytes of each source of each split."""
    splits: dict[str, dict[str, dict[str, int]]] = {}
    for shard in shards:
        empty = {"documents": 0, "tokens": 0, "text_bytes": 0}
        sums = splits.setdefault(shard.split, {}).setdefault(shard.source, empty)
        for key in sums:
            sums[key] += getattr(shard, key)
    return splits
