"""The settings of `python -m data_pipeline prepare`, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from conf.problems import between, local_folder
from data_pipeline.sources.config import DataConfig, validate_data
from data_pipeline.tokenizing.config import TokenizerConfig, validate_tokenizer


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
    # How many commands share the work.
    task_count: int | None = None
    # A shard is closed when its token ids reach this size, in bytes.
    shard_bytes: int = 128 * 2**20
    # Input files are grouped into units of about this size on disk, in bytes; a kill costs one unit for each worker.
    unit_bytes: int = 256 * 2**20


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
    problems += local_folder(f"{prefix}output", config.output)
    problems += between(f"{prefix}shard_bytes", config.shard_bytes, 1, 2**31, "bytes")
    problems += between(f"{prefix}unit_bytes", config.unit_bytes, 1, 2**40, "bytes")
    problems += between(f"{prefix}workers", config.workers, 1, 1024)
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
