"""Where text comes from and how it is split and read: the keys under `data`, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.problems import at_least, between, choice

KINDS = ("standard_library", "text", "jsonl", "parquet", "arrow", "records", "datasets")
FILE_KINDS = ("text", "jsonl", "parquet", "arrow", "records")
# A file is a document, and has no fields.
TEXT_KINDS = ("standard_library", "text")
SPLIT_RULES = ("hash", "given")
SPLIT_UNITS = ("file", "document")
# Records below which a share of rejected ones says little.
TOLERANCE_RECORDS = 10_000
MAX_READER_BYTES = 2**30


@dataclass(frozen=True)
class SplitConfig:
    """How documents are dealt to train, validation and test."""

    # "hash": by a hash, with the shares below. "given": folders train/, validation/, test/ (or the data set's splits).
    rule: str = "hash"
    # What the hash is of: "file" (its name; a whole file goes to one split) or "document" (its text, so that exact
    # duplicates stay together).
    unit: str = "file"
    # Share that is held out for validation.
    validation_fraction: float = 0.02
    # Share that is held out for tests.
    test_fraction: float = 0.0
    # Changes which files or documents are held out.
    seed: int = 0


@dataclass(frozen=True)
class ToleranceConfig:
    """How much of the input may be lost before the preparation fails."""

    # Share of all records that may be rejected. Looked at whenever a unit ends, once a worker has read 10,000 records,
    # and at the end.
    rejected_fraction: float = 0.001
    # Files that may end early, be damaged or not be readable: an unknown number of records is lost in each.
    damaged_files: int = 0
    # Share of the text (of its UTF-8 bytes) that the tokenizer may lose: what becomes an unknown token, or no token.
    # Looked at as the share of records is.
    lost_text_fraction: float = 0.01
    # Share of lost text above which a warning is printed.
    lost_text_warning: float = 0.0001


@dataclass(frozen=True)
class DataConfig:
    """Where documents come from."""

    # "text": a file is a document. "jsonl", "parquet", "arrow": files of records with fields (JSON lines plain, .gz or
    # .zst). "records": any of these three, by each file's ending. "datasets": what the library `datasets` opens.
    kind: str = "standard_library"
    # A folder or file; for kind=datasets a data set name or folder; null for kind=standard_library. The top-level key
    # `source` sets it too.
    path: str | None = None
    # Patterns of the files to read below `path`; `*` crosses folders too, and `**/` may stand for none. Not used by
    # kind=datasets.
    files: list[str] = field(default_factory=list)
    # Names of folders and files (patterns) that are left out wherever they occur.
    exclude: list[str] = field(default_factory=list)
    # Field of a record that holds its text. Not used by text trees.
    text_field: str = "text"
    # Field that holds the source label; null: none. Dots lead into nested fields ("meta.redpajama_set_name") where no
    # field has the whole name. Refused where no document has one.
    source_field: str | None = None
    # Label of records without one.
    source: str = "unknown"
    # Records above this many bytes (text: characters) are rejected; a line of a file is never held beyond it.
    max_record_bytes: int = 256 * 2**20
    # Memory, in bytes, that reading may take beside the record itself: the window of a zstd frame, pages and rows of
    # Parquet, a compressed batch of Arrow, the fields of a JSON record. What needs more is rejected before it is
    # decoded. Not used by text trees, nor by kind=datasets, where the library decides what it holds.
    max_reader_bytes: int = MAX_READER_BYTES
    # kind=datasets: configuration name of the data set; null: its default.
    subset: str | None = None
    # kind=datasets: revision of the data set; null: its newest.
    revision: str | None = None
    split: SplitConfig = field(default_factory=SplitConfig)
    tolerance: ToleranceConfig = field(default_factory=ToleranceConfig)


def validate_data(config: DataConfig, prefix: str = "data") -> list[str]:
    """Every problem of a DataConfig, one line each."""
    problems = choice(f"{prefix}.kind", config.kind, KINDS, "kind")
    if config.kind == "standard_library" and config.path is not None:
        problems.append(f"{prefix}.path: kind=standard_library finds its own path ('{config.path}'); set it to null")
    if config.kind in (*FILE_KINDS, "datasets") and not config.path:
        problems.append(f"{prefix}.path: kind={config.kind} needs a path; set source=PATH or {prefix}.path=PATH")
    if config.kind == "datasets" and config.files:
        problems.append(f"{prefix}.files: kind=datasets does not use patterns ({config.files}); set it to []")
    if config.kind in FILE_KINDS and not config.files:
        problems.append(f"{prefix}.files: no patterns; set for example {prefix}.files=['**/*.txt']")
    if config.kind != "datasets":
        for key in ("subset", "revision"):
            if getattr(config, key) is not None:
                problems.append(
                    f"{prefix}.{key}: only kind=datasets uses it ('{getattr(config, key)}'); set it to null"
                )
    if config.kind in TEXT_KINDS and config.source_field is not None:
        problems.append(f"{prefix}.source_field: kind={config.kind} has no fields; set it to null")
    if not config.text_field:
        problems.append(f"{prefix}.text_field: empty; name the field that holds the text")
    if not config.source:
        problems.append(f"{prefix}.source: empty; name the label of records without one")
    problems += between(f"{prefix}.max_record_bytes", config.max_record_bytes, 1, 2**30)
    if config.kind in (*TEXT_KINDS, "datasets") and config.max_reader_bytes != MAX_READER_BYTES:
        problems.append(
            f"{prefix}.max_reader_bytes: kind={config.kind} does not use it ({config.max_reader_bytes}); leave it out"
        )
    problems += between(f"{prefix}.max_reader_bytes", config.max_reader_bytes, 2**24, 2**40)
    problems += between(f"{prefix}.tolerance.rejected_fraction", config.tolerance.rejected_fraction, 0, 1)
    for key in ("lost_text_fraction", "lost_text_warning"):
        problems += between(f"{prefix}.tolerance.{key}", getattr(config.tolerance, key), 0, 1)
    problems += at_least(f"{prefix}.tolerance.damaged_files", config.tolerance.damaged_files, 0)
    return problems + _validate_split(config, f"{prefix}.split")


def _validate_split(config: DataConfig, prefix: str) -> list[str]:
    split = config.split
    problems = choice(f"{prefix}.rule", split.rule, SPLIT_RULES, "rule")
    if split.rule == "given" and config.kind == "standard_library":
        problems.append(f"{prefix}.rule: the standard library has no split folders; set {prefix}.rule=hash")
    problems += choice(f"{prefix}.unit", split.unit, SPLIT_UNITS, "unit")
    for key in ("validation_fraction", "test_fraction"):
        value = getattr(split, key)
        if not 0 <= value < 1:
            problems.append(f"{prefix}.{key}: must be at least 0 and below 1 ({value})")
    if split.validation_fraction + split.test_fraction >= 1:
        problems.append(f"{prefix}: validation_fraction + test_fraction leave nothing to train on; lower them")
    return problems
