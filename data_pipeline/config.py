"""The settings of a preparation (where text comes from, how it is split and tokenized, what is written where), and of
the order in which a run reads what was prepared.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

KINDS = ("standard_library", "text", "jsonl", "parquet", "arrow", "records", "datasets")
FILE_KINDS = ("text", "jsonl", "parquet", "arrow", "records")
SPLIT_RULES = ("hash", "given")
SPLIT_UNITS = ("file", "document")
TOKENIZER_KINDS = ("sentencepiece", "file")
MODEL_TYPES = ("bpe", "unigram")
BACKENDS = ("auto", "reference", "gigatoken", "fastokens", "splintr")


@dataclass(frozen=True)
class SplitConfig:
    """How documents are dealt to train, validation and test."""

    # "hash": by a hash, with the shares below. "given": folders train/, validation/, test/ (or the data set's splits).
    rule: str = "hash"
    # What the hash is of: "file" (its name; a whole file goes to one split) or "document" (its text, so that exact
    # duplicates stay together).
    unit: str = "file"
    validation_fraction: float = 0.02
    test_fraction: float = 0.0
    # Changes which files or documents are held out.
    seed: int = 0


@dataclass(frozen=True)
class ToleranceConfig:
    """How much of the input may be lost before the preparation fails."""

    # Share of all records that may be rejected. Looked at whenever a unit ends, once a worker has read 10,000 records,
    # and at the end.
    rejected_fraction: float = 0.01
    # Files that may end early or be damaged: an unknown number of records is lost in each.
    damaged_files: int = 0


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
    # Field that holds the source label, with dots into nested fields ("meta.redpajama_set_name"); null: none.
    source_field: str | None = None
    # Label of records without one.
    source: str = "unknown"
    # Records above this many bytes (text: characters) are rejected; a line of a file is never held beyond it.
    max_record_bytes: int = 256 * 2**20
    # kind=datasets: configuration name and revision of the data set; null: its defaults.
    subset: str | None = None
    revision: str | None = None
    split: SplitConfig = field(default_factory=SplitConfig)
    tolerance: ToleranceConfig = field(default_factory=ToleranceConfig)


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: trained on the corpus (`kind=sentencepiece`) or read (`kind=file`)."""

    kind: str = "sentencepiece"
    # kind=file: a SentencePiece .model, a Hugging Face tokenizer.json, or a folder with one of them.
    path: str | None = None
    # The token that ends a document, where the file leaves it open; null: found out.
    eod_token: str | None = None
    # Library that encodes: "auto" takes the fastest that is installed and gives the ids of the reference (sentencepiece
    # or tokenizers), "reference" the latter, a name that one or none.
    backend: str = "auto"
    vocab_size: int = 4096
    model_type: str = "bpe"
    # UTF-8 bytes of training documents that the tokenizer is trained on.
    sample_bytes: int = 4_000_000
    character_coverage: float = 0.9999
    # Bytes stand in for characters without a piece, so that every text can be encoded and decoded exactly.
    byte_fallback: bool = True
    split_digits: bool = True


@dataclass(frozen=True)
class PrepareConfig:
    """`python -m data_pipeline prepare`."""

    data: DataConfig
    tokenizer: TokenizerConfig
    # Folder of the prepared corpus.
    output: str
    # PATH or datasets:NAME; another way to say data.path (and data.kind=datasets).
    source: str | None = None
    # Processes of this command; each works on one unit at a time.
    workers: int = 1
    # Which of how many commands that share the work this is, from 0; null: from SLURM_ARRAY_TASK_ID and its company,
    # else the only one.
    task_index: int | None = None
    task_count: int | None = None
    # A shard is closed when its token ids reach this size, in bytes.
    shard_bytes: int = 128 * 2**20
    # Input files are grouped into units of about this size on disk, in bytes; a kill costs one unit for each worker.
    unit_bytes: int = 256 * 2**20


@dataclass(frozen=True)
class MixturePhaseConfig:
    """A later change of the mixture; exactly one of from_step and from_sample is set."""

    # Optimizer step or sample of the run from which it holds.
    from_step: int | None = None
    from_sample: int | None = None
    # As in OrderConfig.
    weights: dict[str, float] | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class OrderConfig:
    """The order in which a run reads a prepared corpus; its keys stand under `corpus` in the configuration of a run."""

    split: str = "train"
    # Share of each source by its label, in tokens; null: by `temperature`.
    weights: dict[str, float] | None = None
    # Shares in proportion to size ** (1 / temperature): 1 is proportional, large is even; null: proportional.
    temperature: float | None = None
    # Passes over a source, by its label, after which it is left out and the others share its place; null: no caps.
    epoch_caps: dict[str, float] | None = None
    # Changes of the mixture during the run.
    phases: list[MixturePhaseConfig] = field(default_factory=list)
    # concatenate: documents one after another, cut at the end of each sample. best_fit: no document is cut that fits.
    packing: str = "concatenate"
    # Where the plan of packing=best_fit is kept; null: packing/ in the corpus folder.
    packing_directory: str | None = None
    # Shards that are read at a time: those of a pass are permuted and taken in windows of so many, samples permuted
    # inside a window. For a remote corpus larger than its cache; null: all samples permuted as a whole.
    window_shards: int | None = None


def validate_data(config: DataConfig, prefix: str = "data") -> list[str]:
    """Every problem of a DataConfig, one line each."""
    problems = []
    if config.kind not in KINDS:
        problems.append(f"{prefix}.kind: no such kind ('{config.kind}'); choose one of {', '.join(KINDS)}")
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
    if config.kind in ("standard_library", "text") and config.source_field is not None:
        problems.append(f"{prefix}.source_field: kind={config.kind} has no fields; set it to null")
    if not config.text_field:
        problems.append(f"{prefix}.text_field: empty; name the field that holds the text")
    if not config.source:
        problems.append(f"{prefix}.source: empty; name the label of records without one")
    if not 1 <= config.max_record_bytes <= 2**30:
        problems.append(f"{prefix}.max_record_bytes: must be between 1 and {2**30} ({config.max_record_bytes})")
    tolerance = config.tolerance
    if not 0 <= tolerance.rejected_fraction <= 1:
        value = tolerance.rejected_fraction
        problems.append(f"{prefix}.tolerance.rejected_fraction: must be between 0 and 1 ({value})")
    if tolerance.damaged_files < 0:
        problems.append(f"{prefix}.tolerance.damaged_files: must be at least 0 ({tolerance.damaged_files})")
    return problems + _validate_split(config, f"{prefix}.split")


def _validate_split(config: DataConfig, prefix: str) -> list[str]:
    split = config.split
    problems = []
    if split.rule not in SPLIT_RULES:
        problems.append(f"{prefix}.rule: no such rule ('{split.rule}'); choose one of {', '.join(SPLIT_RULES)}")
    if split.rule == "given" and config.kind == "standard_library":
        problems.append(f"{prefix}.rule: the standard library has no split folders; set {prefix}.rule=hash")
    if split.unit not in SPLIT_UNITS:
        problems.append(f"{prefix}.unit: no such unit ('{split.unit}'); choose one of {', '.join(SPLIT_UNITS)}")
    for key in ("validation_fraction", "test_fraction"):
        value = getattr(split, key)
        if not 0 <= value < 1:
            problems.append(f"{prefix}.{key}: must be at least 0 and below 1 ({value})")
    if split.validation_fraction + split.test_fraction >= 1:
        problems.append(f"{prefix}: validation_fraction + test_fraction leave nothing to train on; lower them")
    return problems


def validate_tokenizer(config: TokenizerConfig, prefix: str = "tokenizer") -> list[str]:
    """Every problem of a TokenizerConfig, one line each."""
    problems = []
    if config.kind not in TOKENIZER_KINDS:
        problems.append(f"{prefix}.kind: no such kind ('{config.kind}'); choose one of {', '.join(TOKENIZER_KINDS)}")
    if config.kind == "file" and not config.path:
        problems.append(f"{prefix}.path: kind=file needs a path; set {prefix}.path=FILE")
    if config.backend not in BACKENDS:
        problems.append(f"{prefix}.backend: no such library ('{config.backend}'); choose one of {', '.join(BACKENDS)}")
    if config.kind != "sentencepiece":
        return problems
    if config.path is not None:
        problems.append(f"{prefix}.path: a trained tokenizer has no path ('{config.path}'); set {prefix}.kind=file")
    if config.eod_token is not None:
        problems.append(f"{prefix}.eod_token: a trained tokenizer ends documents with '</s>'; set it to null")
    if config.model_type not in MODEL_TYPES:
        problems.append(
            f"{prefix}.model_type: no such type ('{config.model_type}'); choose one of {', '.join(MODEL_TYPES)}"
        )
    lowest = 300 if config.byte_fallback else 32
    if config.vocab_size < lowest:
        problems.append(f"{prefix}.vocab_size: must be at least {lowest} ({config.vocab_size})")
    if config.sample_bytes < 1:
        problems.append(f"{prefix}.sample_bytes: must be positive ({config.sample_bytes})")
    if not 0.9 <= config.character_coverage <= 1:
        problems.append(f"{prefix}.character_coverage: must be between 0.9 and 1 ({config.character_coverage})")
    return problems


def validate_prepare(config: PrepareConfig, prefix: str = "") -> list[str]:
    """Every problem of a PrepareConfig, one line each."""
    problems = []
    try:
        config = resolve_source(config)
    except ValueError as error:
        problems.append(f"{prefix}{error}")
        config = replace(config, data=replace(config.data, path=config.data.path or config.source))
    problems += validate_data(config.data, f"{prefix}data") + validate_tokenizer(config.tokenizer, f"{prefix}tokenizer")
    if not config.output:
        problems.append(f"{prefix}output: empty; set {prefix}output=DIR")
    for key, highest in (("shard_bytes", 2**31), ("unit_bytes", 2**40)):
        value = getattr(config, key)
        if not 1 <= value <= highest:
            problems.append(f"{prefix}{key}: must be between 1 and {highest} bytes ({value})")
    if not 1 <= config.workers <= 1024:
        problems.append(f"{prefix}workers: must be between 1 and 1024 ({config.workers})")
    return problems + _validate_task(config, prefix)


def _validate_task(config: PrepareConfig, prefix: str) -> list[str]:
    index, count = config.task_index, config.task_count
    if index is None and count is None:
        return []
    if index is None or count is None:
        given = "task_index" if count is None else "task_count"
        return [f"{prefix}{given}: task_index and task_count go together; set both or neither"]
    if not 0 <= index < count:
        return [f"{prefix}task_index: must be at least 0 and below task_count ({index} of {count})"]
    return []


def resolve_source(config: PrepareConfig) -> PrepareConfig:
    """`config` with its `source` put into `data`, where everything else looks for it. Raises ValueError."""
    source, data = config.source, config.data
    if source is None:
        return config
    if data.path is not None:
        raise ValueError(f"source: data.path is set too ('{source}' and '{data.path}'); give one of them")
    if data.kind == "standard_library":
        raise ValueError(f"source: data=standard_library finds its own path ('{source}'); choose another data=")
    kind, separator, name = source.partition(":")
    if separator and kind == "datasets":
        data = replace(data, kind="datasets", path=name, files=[], exclude=[])
    else:
        data = replace(data, path=source)
    return replace(config, source=None, data=data)
