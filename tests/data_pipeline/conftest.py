"""Corpora that several test files read."""

from __future__ import annotations

import random

import pytest
import tokenizers

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.sources.config import DataConfig, SplitConfig
from data_pipeline.tokenizing.tokenizer import train_sentencepiece
from tests.data_pipeline.small_corpora import (
    TOKENIZER,
    quietly,
    random_text,
    sample_texts,
    slimpajama_config,
    write_slimpajama,
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three sources, three splits, many shards of few documents."""
    folder = tmp_path_factory.mktemp("corpus")
    write_slimpajama(folder / "raw")
    quietly(slimpajama_config(folder / "raw", folder / "prepared"))
    return Corpus.open(folder / "prepared")


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """One source, held out by file."""
    folder = tmp_path_factory.mktemp("text_corpus")
    rng = random.Random(5)
    (folder / "raw").mkdir()
    for number in range(40):
        (folder / "raw" / f"file{number}.txt").write_text(random_text(rng, rng.randrange(1, 300)), "utf-8")
    split = SplitConfig(validation_fraction=0.2)
    data = DataConfig(kind="text", path=str(folder / "raw"), files=["**/*.txt"], source="text", split=split)
    quietly(PrepareConfig(data, TOKENIZER, str(folder / "prepared"), shard_bytes=3000, unit_bytes=20_000))
    return Corpus.open(folder / "prepared")


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece") / "code.model"
    path.write_bytes(train_sentencepiece(sample_texts(), TOKENIZER))
    return path


@pytest.fixture(scope="session")
def hugging_face_file(tmp_path_factory):
    """A byte-level BPE in the manner of GPT-NeoX."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>", "<|padding|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(sample_texts(), trainer)
    model.enable_truncation(8)
    path = tmp_path_factory.mktemp("hugging_face") / "tokenizer.json"
    model.save(str(path))
    return path
