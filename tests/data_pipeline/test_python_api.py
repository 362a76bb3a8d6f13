"""`data_pipeline` in Python, without a configuration: what a notebook uses."""

from __future__ import annotations

import subprocess
import sys
import typing

import pytest
import torch

import data_pipeline
from conf import ConfigError
from data_pipeline import DataError, MixtureConfig, PrepareConfig, SampleStream, StepLoader, open_corpus, prepare
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.sources.config import DataConfig
from data_pipeline.tokenizing.config import TokenizerConfig


def test_a_corpus_a_stream_and_a_batch(corpus: Corpus):
    opened = open_corpus(corpus.directory)
    assert opened.fingerprint == corpus.fingerprint
    first, *_ = sources = opened.sources("train")
    mixture = MixtureConfig(weights={source: 3 if source == first else 1 for source in sources})
    stream = SampleStream(opened, "train", sequence_length=32, seed=0, mixture=mixture)
    batch = stream.batch(first_sample=0, count=4096)
    assert batch.tokens.shape == batch.targets.shape == (4096, 32) and batch.tokens.dtype == torch.int64
    assert batch.sources.count(first) == round(4096 * 3 / (2 + len(sources)))
    again = stream.batch([5, 4095])
    assert torch.equal(again.tokens, batch.tokens[[5, 4095]])
    with pytest.raises(ValueError, match="the first sample is one number"):
        stream.batch([5, 4095], 2)
    sizes = {"global_batch_size": 4, "micro_batch_size": 2, "replica": 0, "replicas": 1}
    with StepLoader(stream, first_sample=8, **sizes) as steps:
        assert torch.equal(next(steps)[1].tokens, batch.tokens[10:12])


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_corpus(tmp_path / "nowhere")
    with pytest.raises(DataError, match="needs a cache on a local disk"):
        open_corpus("memory://nowhere")


def test_a_preparation_with_wrong_settings_names_them_all_and_makes_no_folder(tmp_path):
    config = PrepareConfig(DataConfig(kind="jsonl"), TokenizerConfig(kind="file"), str(tmp_path / "new"), workers=0)
    with pytest.raises(ConfigError, match="4 problems") as caught:
        prepare(config)
    assert {problem.split(":")[0] for problem in caught.value.problems} == {
        "data.path",
        "data.files",
        "tokenizer.path",
        "workers",
    }
    assert not (tmp_path / "new").exists()


def test_every_name_is_there_and_documented():
    hints = typing.get_type_hints(data_pipeline.open_corpus)
    assert hints["return"] is data_pipeline.Corpus
    for name in data_pipeline.__all__:
        assert getattr(data_pipeline, name).__doc__, name
        assert name in dir(data_pipeline)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        data_pipeline.nonsense  # noqa: B018


def test_nothing_is_imported_before_it_is_asked_for():
    heavy = {"torch", "numpy", "pyarrow", "hydra", "sentencepiece"}
    command = "import sys, data_pipeline.__main__, data_pipeline.preparing.config\n"
    command += f"sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
