"""From the settings of a source to the source."""

from __future__ import annotations

from data_pipeline.sources.config import DataConfig
from data_pipeline.sources.dataset_source import DatasetsSource
from data_pipeline.sources.file_sources import RecordSource, TextSource
from data_pipeline.sources.source import Source


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
