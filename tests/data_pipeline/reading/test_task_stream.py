"""Samples of tasks: each a function of the task, the seed and its number, whatever the world; answers are scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipeline.reading.batch import MASKED, Columns
from data_pipeline.reading.loader import StepLoader
from data_pipeline.reading.task_stream import TEST, TRAIN, TaskCorpus, TaskStream
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.tasks import TASKS
from data_pipeline.tokenizing.tokenizer import Tokenizer

LENGTH = 24


def stream_of(name: str = "parity", seed: int = 3, **settings) -> TaskStream:
    return TaskStream(TaskCorpus(TaskConfig(name, **settings)), TRAIN, LENGTH, seed)


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_is_an_example_in_the_words_of_the_tokenizer(name):
    settings = {"pairs": 3, "vocabulary": 50} if name == "mqar" else {}
    stream = stream_of(name, settings=settings)
    batch = stream.batch(5, 4)
    tokenizer = stream.corpus.tokenizer()
    for row, number in enumerate(range(5, 9)):
        example = stream.corpus.example(3, TRAIN, number, LENGTH)
        count = len(example.words)
        assert tokenizer.encode(" ".join(example.words)) == batch.tokens[row, :count].tolist()
        assert tokenizer.decode(batch.tokens[row].tolist()) == " ".join(example.words)
        scored = {place: word for place, word in enumerate(example.answers) if word is not None}
        assert scored and (batch.targets[row] != MASKED).nonzero().flatten().tolist() == list(scored)
        assert tokenizer.encode(" ".join(scored.values())) == batch.targets[row][batch.targets[row] != MASKED].tolist()
    assert batch.document_start[:, 0].all() and not batch.document_start[:, 1:].any()
    assert batch.sources == [name] * 4


def test_every_beginning_is_scored_or_the_whole_alone():
    every, answer = stream_of(scored="every").batch(0, 50), stream_of().batch(0, 50)
    assert not torch.equal(every.targets, answer.targets)
    lengths = (answer.tokens != 0).sum(1)
    assert (answer.targets != MASKED).sum(1).eq(1).all() and torch.equal((every.targets != MASKED).sum(1), lengths)
    last = torch.arange(LENGTH) == lengths[:, None] - 1
    assert ((answer.targets != MASKED) == last).all()


def test_lengths_are_alike_likely_and_the_longest_fills_the_sample():
    lengths = (stream_of(shortest=5).batch(0, 4000).tokens != 0).sum(1)
    counts = torch.bincount(lengths, minlength=LENGTH + 1)
    assert counts[:5].sum() == 0 and (counts[5:] - 200).abs().max() < 60


def test_the_order_is_the_same_for_any_world_slice_and_start():
    whole = stream_of().batch(0, 36)
    for replicas, micro, first in ((1, 12, 0), (2, 3, 1), (3, 2, 2)):
        rows = []
        for replica in range(replicas):
            settings = {"global_batch_size": 12, "micro_batch_size": micro, "replica": replica, "replicas": replicas}
            with StepLoader(stream_of(), **settings, first_sample=first * 12) as loader:
                rows += [batch.tokens for batch in next(loader)]
                assert loader.consumed_samples == (first + 1) * 12
        assert torch.equal(torch.cat(rows), whole.tokens[first * 12 : first * 12 + 12])
    half = stream_of().batch(np.array([7, 2]), columns=Columns.of_rank(LENGTH, 1, 2))
    assert torch.equal(half.tokens, whole.tokens[[7, 2], LENGTH // 2 :])
    assert torch.equal(half.targets, whole.targets[[7, 2], LENGTH // 2 :]) and not half.document_start.any()


def test_what_differs_by_seed_split_or_settings_has_another_identity():
    streams = [
        stream_of(),
        stream_of(seed=4),
        stream_of(scored="every"),
        stream_of(shortest=3),
        stream_of("cycle_navigation"),
        stream_of("cycle_navigation", settings={"modulus": 7}),
        TaskStream(TaskCorpus(TaskConfig("parity")), TEST, LENGTH, 3),
    ]
    assert len({stream.fingerprint for stream in streams}) == len(streams)
    assert stream_of().fingerprint == stream_of().fingerprint
    assert not torch.equal(streams[0].batch(0, 20).tokens, streams[1].batch(0, 20).tokens)
    assert not torch.equal(streams[0].batch(0, 20).tokens, streams[6].batch(0, 20).tokens)


def test_the_tokenizer_outlives_its_file(tmp_path):
    corpus = TaskCorpus(TaskConfig("s3"))
    corpus.tokenizer().save_to(tmp_path)
    kept = Tokenizer.load(tmp_path)
    assert kept.gives_same_ids(corpus.tokenizer()) and kept.vocab_size == corpus.vocab_size == 8
    assert not kept.gives_same_ids(TaskCorpus(TaskConfig("parity")).tokenizer())
