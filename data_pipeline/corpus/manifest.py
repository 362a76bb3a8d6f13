"""`manifest.json`: what a prepared corpus consists of, with sizes and checksums; the corpus' identity is its hash.

It stays small at any size of corpus: the shards are rows of `shards.arrow` (shard_table.py), whose checksum it holds.
Written last and atomically: a folder without a manifest is not a corpus. It holds no clock time, no host name and no
absolute path: the same input and settings give the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from conf.problems import is_later_format, other_format
from conf.stored_values import fits, misfits, shortened
from data_pipeline.corpus.files import path_in, write_whole
from data_pipeline.corpus.shard_table import MANIFEST_FILE, ShardTable, ShardTableEntry
from data_pipeline.errors import CorpusError

FORMAT = "xlstm-pretrain corpus"
FORMAT_VERSION = 2
# What an unfinished preparation keeps beside the corpus.
PREPARING_FOLDER = "preparing"


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
class InputsEntry:
    """`inputs.jsonl` (one line an input file), and its sums: records = documents + all rejected."""

    file: str
    sha256: str
    files: int
    records: int
    documents: int
    rejected: dict[str, int]
    repaired: dict[str, int]
    # Text that the tokenizer lost: {"documents": that lost any, "bytes": UTF-8 bytes of it}; empty: none.
    lost: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportEntry:
    """`report.jsonl`: one line for each record rejected or repaired (the first of each unit), and its hash."""

    file: str
    sha256: str
    lines: int


@dataclass(frozen=True)
class Manifest:
    """The whole manifest; `shards` is the table of shards, one `ShardEntry` a row."""

    settings: dict[str, Any]
    tokenizer: TokenizerEntry
    token_dtype: str
    block_bytes: int
    shards: ShardTable
    inputs: InputsEntry
    report: ReportEntry

    @cached_property
    def splits(self) -> dict[str, dict[str, dict[str, int]]]:
        """split -> source -> {"documents", "tokens", "text_bytes"}, sums over `shards`."""
        return self.shards.sums()

    def _document(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "token_dtype": self.token_dtype,
            "block_bytes": self.block_bytes,
            "splits": self.splits,
            "shards": dataclasses.asdict(self.shards.entry),
            "inputs": {k: v for k, v in dataclasses.asdict(self.inputs).items() if k != "lost" or v},
            "report": dataclasses.asdict(self.report),
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of everything above, the checksum of the table of shards included."""
        return fingerprint_of(self._document())

    def write(self, folder: Path) -> None:
        """Write `shards.arrow`, then `manifest.json`, into `folder`, each atomically."""
        self.shards.write(folder)
        document = {**self._document(), "fingerprint": self.fingerprint}
        text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=True) + "\n"
        write_whole(folder / MANIFEST_FILE, text.encode())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read and check `manifest.json` and map `shards.arrow`.

        Raises CorpusError when one is missing, altered or of another version, naming the file.
        """
        path = folder / MANIFEST_FILE
        if not folder.is_dir():
            raise CorpusError(f"{folder}: no such folder; prepare a corpus with `python -m data_pipeline prepare`")
        if not path.is_file():
            raise CorpusError(f"{folder}: no {MANIFEST_FILE}, so not a finished corpus; {_how_to_finish(folder)}")
        try:
            document = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{path}: altered or damaged, not JSON ({error}); {_ADVICE}") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CorpusError(f"{path}: not a corpus manifest (its 'format' is not '{FORMAT}')")
        found = document.get("format_version")
        if is_later_format(found, FORMAT_VERSION):
            raise CorpusError(other_format(path, found, FORMAT_VERSION))
        if problem := other_format(path, found, FORMAT_VERSION):
            raise CorpusError(
                f"{problem} (1 listed the shards in manifest.json itself, 2 in shards.arrow); prepare the corpus again "
                "in a new folder or use the release that wrote it"
            )
        recorded = document.pop("fingerprint", None)
        try:
            is_as_written = fingerprint_of(document) == recorded
        # No JSON has such numbers, and none that we write.
        except ValueError:
            is_as_written = False
        if not is_as_written:
            raise CorpusError(f"{path}: altered after it was written (its fingerprint does not match); {_ADVICE}")
        if problems := _misfits(document):
            raise CorpusError(
                f"{path}: keys missing or unknown, or values of a wrong type ({'; '.join(problems)}); {_ADVICE}"
            )
        manifest = _from_document(document, folder)
        if manifest.token_dtype not in ("uint16", "uint32") or manifest.block_bytes < 1:
            raise CorpusError(
                f"{path}: token_dtype '{manifest.token_dtype}' or block_bytes {manifest.block_bytes} cannot be; "
                f"{_ADVICE}"
            )
        if manifest.fingerprint != recorded:
            raise CorpusError(f"{path}: its sums are not those of {manifest.shards.entry.file}; {_ADVICE}")
        return manifest


_ADVICE = "restore the file or prepare the corpus again elsewhere"


def _how_to_finish(folder: Path) -> str:
    if (folder / PREPARING_FOLDER).is_dir():
        return f"its preparation goes on with the same command, `python -m data_pipeline prepare ... output={folder}`"
    if (folder / "shards").is_dir():
        return _ADVICE
    if any(folder.iterdir()):
        return f"if it holds text, prepare it: `python -m data_pipeline prepare source={folder} ... output=ELSEWHERE`"
    return f"it is empty; prepare a corpus with `python -m data_pipeline prepare ... output={folder}`"


_PARTS: dict[str, type] = {
    "tokenizer": TokenizerEntry,
    "inputs": InputsEntry,
    "report": ReportEntry,
    "shards": ShardTableEntry,
}
# Of the document, and of no field.
_OTHERS = ("format", "format_version", "splits")


def _misfits(document: dict[str, Any]) -> list[str]:
    """What of `document` is not of the type that is wanted, the splits apart: they are compared with the table."""
    plain = {"settings": dict[str, Any], "token_dtype": str, "block_bytes": int}
    unknown = [key for key in document if key not in (*_OTHERS, *_PARTS, *plain)]
    problems = [f"unknown key {key}" for key in unknown]
    problems += [
        f"{key} cannot be {shortened(document.get(key))}" for key in plain if not fits(document.get(key), plain[key])
    ]
    return problems + [line for key, kind in _PARTS.items() for line in misfits(kind, document.get(key), f"{key}.")]


def _from_document(document: dict[str, Any], folder: Path) -> Manifest:
    fields = {key: value for key, value in document.items() if key not in _OTHERS}
    fields |= {key: kind(**document[key]) for key, kind in _PARTS.items()}
    for key in ("tokenizer", "inputs", "report"):
        path_in(folder, fields[key].file, MANIFEST_FILE, f"{key}.file")
    fields["shards"] = ShardTable.read(folder, fields["shards"])
    return Manifest(**fields)


def canonical_json(value: Any) -> str:
    """The one spelling of `value` that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint_of(value: Any) -> str:
    """Identity of `value`: the hex sha256 of its canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
