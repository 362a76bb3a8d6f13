"""Texts of a corpus that are long enough to be read to a context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from conf.problems import ConfigError
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.token_sequence import TokenSequence

DOCUMENTS, JOINED = "documents", "joined"
TEXTS = (DOCUMENTS, JOINED)


@dataclass(frozen=True)
class LongText:
    """A stretch of a source's tokens, from `start` on."""

    sequence: TokenSequence
    start: int
    dtype: np.dtype

    def read(self, first: int, count: int) -> np.ndarray:
        """Its tokens first ... first + count - 1, int64. Raises CorpusError."""
        tokens, starts = np.empty(count, dtype=self.dtype), np.zeros(count, dtype=bool)
        self.sequence.read(self.start + first, tokens, starts)
        return tokens.astype(np.int64)


def find_long_texts(
    corpus: Corpus, split: str, source: str | None, kind: str, tokens: int, most: int
) -> list[LongText]:
    """The first texts of a split, up to `most`, that have `tokens` tokens; `source`: of this one alone.

    `kind`: "documents", each from its beginning; or "joined", what stands one behind the other in the corpus, whatever
    documents begin in it. Raises ConfigError where there is none, CorpusError.
    """
    dtype = np.dtype(corpus.manifest.token_dtype)
    found: list[LongText] = []
    longest = 0
    for label in [source] if source else corpus.sources(split):
        sequence = corpus.sequence(split, label)
        starts, lengths = _joined(sequence, tokens) if kind == JOINED else _documents(sequence)
        longest = max(longest, int(lengths.max(initial=0)))
        found += [LongText(sequence, int(start), dtype) for start in starts[lengths >= tokens][: most - len(found)]]
    if not found:
        what = "document" if kind == DOCUMENTS else "source"
        raise ConfigError(
            [
                f"suite.contexts: a context of {tokens - 1:,} needs {tokens:,} tokens, and the longest {what} of split "
                f"'{split}' has {longest:,}; leave the longest contexts out"
                + (", or set suite.text=joined" if kind == DOCUMENTS else "")
            ]
        )
    return found


def _documents(sequence: TokenSequence) -> tuple[np.ndarray, np.ndarray]:
    """Where documents begin, and how many tokens they have: as in training with the end-of-document id of the one
    before, which opens them, and up to their own, which is predicted."""
    offsets = [sequence.document_offsets(number) for number in range(sequence.shards)]
    begins = [np.maximum(of_shard[:-1] - 1, 0) for of_shard in offsets] or [np.empty(0, dtype=np.int64)]
    ends = [of_shard[1:] for of_shard in offsets] or [np.empty(0, dtype=np.int64)]
    return np.concatenate(begins), np.concatenate(ends) - np.concatenate(begins)


def _joined(sequence: TokenSequence, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Stretches of `tokens` tokens; where there is none, one of all that there are."""
    count = sequence.tokens // tokens
    if not count:
        return np.zeros(1, dtype=np.int64), np.array([sequence.tokens])
    return np.arange(count, dtype=np.int64) * tokens, np.full(count, tokens)
