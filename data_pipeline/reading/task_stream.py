"""Samples of a synthetic task: sample i is example i, a pure function of the task, the seed and i.

Axes: B batch (samples), S sequence.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.corpus.manifest import fingerprint_of
from data_pipeline.reading.batch import MASKED, Batch, Columns, DamagedSamples, sample_numbers
from data_pipeline.tasks.base import Example
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.draws import Draws
from data_pipeline.tasks.tasks import TASKS, settings_of
from data_pipeline.tokenizing.tokenizer import HuggingFaceTokenizer, Tokenizer

# Part of the identity of a run: another version makes other examples.
TASKS_VERSION = 1
# Ids 0 and 1; the words of the task follow.
END_OF_DOCUMENT, UNKNOWN = "<|endoftext|>", "<unk>"
TRAIN, TEST = "train", "test"


class TaskCorpus:
    """A task with settings, and its words as tokens; what of a `Corpus` can be known of it."""

    def __init__(self, config: TaskConfig):
        self.config = config
        self.directory = f"the task {config.name}"
        self.splits = [TRAIN, TEST]
        self.task, self.settings = TASKS[config.name], settings_of(config)
        words = [END_OF_DOCUMENT, UNKNOWN, *self.task.vocabulary(self.settings)]
        self.ids = {word: number for number, word in enumerate(words)}
        assert len(self.ids) == len(words), "a task names each word once"
        self.vocab_size = len(words)
        # A tokenizer lies in a file.
        self._folder = tempfile.TemporaryDirectory()
        self._tokenizer = _word_tokenizer(self.ids, Path(self._folder.name))

    def tokenizer(self) -> Tokenizer:
        """Words with spaces between them."""
        return self._tokenizer

    @property
    def fingerprint(self) -> str:
        """Identity of the examples but for the seed (hex sha256)."""
        return fingerprint_of({"tasks_version": TASKS_VERSION, **asdict(self.config)})

    def example(self, seed: int, split: str, number: int, longest: int, shortest: int | None = None) -> Example:
        """Example `number` of a split: of a length from `shortest` (null: of the configuration) to `longest` words."""
        least = max(self.config.shortest if shortest is None else shortest, self.task.shortest(self.settings))
        draws = Draws(self.config.name, seed, split, longest, number)
        length = least + draws.one_below(longest - least + 1)
        found = self.task.example(draws, length, self.settings)
        assert len(found.words) == len(found.answers) <= longest, "an example keeps to its length"
        if self.task.tracks and self.config.scored == "answer":
            last = max(place for place, answer in enumerate(found.answers) if answer is not None)
            silent: list[str | None] = [None] * last
            return Example(found.words, silent + found.answers[last:])
        return found

    def arrays(self, examples: list[Example], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets, int64 [B, S]; behind an example there are ends of documents, and no targets."""
        tokens = np.full((len(examples), length), self.ids[END_OF_DOCUMENT], dtype=np.int64)
        targets = np.full((len(examples), length), MASKED, dtype=np.int64)
        for row, example in enumerate(examples):
            count = len(example.words)
            tokens[row, :count] = [self.ids[word] for word in example.words]
            targets[row, :count] = [MASKED if word is None else self.ids[word] for word in example.answers]
        return tokens, targets


class TaskStream:
    """The endless order of a task's samples; the counterpart of `SampleStream`."""

    def __init__(self, corpus: TaskCorpus, split: str, sequence_length: int, seed: int):
        self.corpus = corpus
        self.split = split
        self.sequence_length = sequence_length
        self.seed = seed
        self.damage = DamagedSamples("fail")

    @property
    def identity(self) -> dict[str, Any]:
        """As `SampleStream.identity`."""
        return {
            "corpus": self.corpus.fingerprint,
            "tokenizer": self.corpus.tokenizer().fingerprint,
            "format_version": 0,
            "order_version": TASKS_VERSION,
            "split": self.split,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "mixture": "made",
            "packing": "one example a sample",
            "lanes": None,
        }

    @property
    def fingerprint(self) -> str:
        """Identity of the order (hex sha256)."""
        return fingerprint_of(self.identity)

    def batch(self, first_sample: int | np.ndarray, count: int | None = None, columns: Columns | None = None) -> Batch:
        """As `SampleStream.batch`."""
        numbers = sample_numbers(first_sample, count).tolist()
        examples = [self.corpus.example(self.seed, self.split, i, self.sequence_length) for i in numbers]
        columns = columns or Columns(0, self.sequence_length)
        tokens, targets = (
            torch.from_numpy(np.ascontiguousarray(array[:, columns.begin : columns.end]))
            for array in self.corpus.arrays(examples, self.sequence_length)
        )
        starts = torch.zeros(tokens.shape, dtype=torch.bool)
        if columns.begin == 0:
            starts[:, 0] = True
        return Batch(tokens, targets, starts, [self.corpus.config.name] * len(numbers))


def _word_tokenizer(ids: dict[str, int], folder: Path) -> Tokenizer:
    """Of words between spaces. Written here, not by the library: its content, and so its identity, never changes."""
    end = {"id": ids[END_OF_DOCUMENT], "content": END_OF_DOCUMENT, "special": True}
    end |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": UNKNOWN},
    }
    path = folder / HuggingFaceTokenizer.canonical_name
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return Tokenizer.load(path)
