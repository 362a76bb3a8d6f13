"""From text to batches: prepare a corpus of token ids once, then read its samples in an order that repeats exactly.

    corpus = open_corpus("corpora/demo")
    mixture = MixtureConfig(weights={"web": 3, "code": 1})
    stream = SampleStream(corpus, "train", sequence_length=256, seed=0, mixture=mixture)
    batch = stream.batch(first_sample=0, count=8)  # batch.tokens and batch.targets: int64 [8, 256]

Sample i of a stream is the same for ever, so a position in it is one number. `mixture=None` takes all sources as they
are. `StepLoader` reads the batches of optimizer steps ahead. A corpus is written by `python -m data_pipeline prepare`,
or here by `prepare`.

The rooms, each of which imports only from rooms above it:

    tokenizing/   text to token ids and back                     sources/      documents out of files and data sets
    corpus/       shards, their table, the manifest (on tokenizing)
    ordering/     permutations, mixtures, packing (on corpus)
    preparing/    text to a corpus (on all above)                reading/      batches of samples (on all above)

`errors` holds what can go wrong at run time; each room's `config` the settings that it owns, with their rules.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.corpus.corpus import Corpus, open_corpus
    from data_pipeline.errors import DataError
    from data_pipeline.ordering.mixture import MixtureConfig
    from data_pipeline.preparing.config import PrepareConfig
    from data_pipeline.preparing.prepare import prepare
    from data_pipeline.reading.batch import Batch
    from data_pipeline.reading.loader import StepLoader
    from data_pipeline.reading.stream import SampleStream

__all__ = [
    "Batch",
    "Corpus",
    "DataError",
    "MixtureConfig",
    "PrepareConfig",
    "SampleStream",
    "StepLoader",
    "open_corpus",
    "prepare",
]

# Imported when asked for: the command line's --help and the workers of a preparation do without torch.
_HOMES = {
    "Batch": "reading.batch",
    "Corpus": "corpus.corpus",
    "DataError": "errors",
    "MixtureConfig": "ordering.mixture",
    "PrepareConfig": "preparing.config",
    "SampleStream": "reading.stream",
    "StepLoader": "reading.loader",
    "open_corpus": "corpus.corpus",
    "prepare": "preparing.prepare",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
