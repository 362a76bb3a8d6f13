"""Batches against an oracle that scans documents one by one, and the order over worlds, restarts and threads."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

from data_pipeline.corpus import token_sequence
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.open_files import OpenFiles
from data_pipeline.errors import CorpusError
from data_pipeline.ordering.config import MixturePhaseConfig, OrderConfig
from data_pipeline.ordering.mixture import MixtureConfig
from data_pipeline.reading.batch import MASKED, Columns
from data_pipeline.reading.loader import StepLoader
from data_pipeline.reading.run_order import open_order
from data_pipeline.reading.stream import Lanes, SampleStream, WindowStream, sequential_batches


def oracle(corpus: Corpus, split: str, source: str) -> tuple[list[int], list[bool]]:
    """All tokens of a source and where documents start, from the rows of its shards one document at a time."""
    tokens: list[int] = []
    starts: list[bool] = []
    sequence = corpus.sequence(split, source)
    for number in range(len(sequence.entries)):
        shard = sequence.shard(number)
        for document in range(shard.documents):
            row = shard.tokens[shard.offsets[document] : shard.offsets[document + 1]].tolist()
            tokens += row
            starts += [False] * (len(row) - 1) + [True]
    starts[0] = True
    return tokens, starts


@pytest.mark.parametrize("stride", [1, 3, 256])
@pytest.mark.parametrize("length", [1, 7, 64, 500])
def test_samples_and_document_starts_agree_with_the_oracle(corpus, length, stride, monkeypatch):
    if stride > 1:
        monkeypatch.setattr(token_sequence, "INDEXED_DOCUMENTS", 0)
        monkeypatch.setattr(token_sequence, "INDEX_STRIDE", stride)
    corpus = Corpus.open(corpus.directory)
    stream = SampleStream(corpus, "train", length, seed=1)
    sources = {source: oracle(corpus, "train", source) for source in corpus.sources("train")}
    count = min(stream.samples_per_epoch, 400)
    batch = stream.batch(0, count)
    numbers, _, samples = stream.mixture.locate(np.arange(count))
    assert batch.tokens.shape == batch.targets.shape == batch.document_start.shape == (count, length)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.document_start.dtype == torch.bool
    for row in range(count):
        source = stream.mixture.sources[numbers[row]]
        tokens, starts = sources[source]
        begin = int(samples[row]) * length
        assert batch.sources[row] == source
        assert batch.tokens[row].tolist() == tokens[begin : begin + length]
        assert batch.targets[row].tolist() == tokens[begin + 1 : begin + length + 1]
        assert batch.document_start[row].tolist() == starts[begin : begin + length]
    assert batch.document_start.any()


def test_samples_span_shards(corpus):
    stream = SampleStream(corpus, "train", 1500, seed=0)
    assert any(len(stream.origin(index).parts) > 1 for index in range(stream.samples_per_epoch))


def test_an_epoch_covers_every_sample_and_every_token_but_one_tail_a_source(text_corpus):
    length = 16
    stream = SampleStream(text_corpus, "train", length, seed=0)
    tokens, _ = oracle(text_corpus, "train", "text")
    n = stream.samples_per_epoch
    assert n == (len(tokens) - 1) // length
    epoch = stream.batch(0, n)
    order = np.argsort(stream.mixture.locate(np.arange(n))[2])
    assert epoch.tokens[order].flatten().tolist() == tokens[: n * length]
    assert not torch.equal(epoch.tokens, stream.batch(n, n).tokens)


def test_indices_and_ranges_and_fresh_streams_agree(corpus):
    stream = SampleStream(corpus, "train", 32, seed=4, mixture=MixtureConfig({"RedPajamaC4": 3, "RedPajamaBook": 1}))
    whole = stream.batch(0, 3000)
    chosen = np.array([2999, 0, 1024, 1023, 5])
    again = SampleStream(
        corpus, "train", 32, seed=4, mixture=MixtureConfig({"RedPajamaC4": 3, "RedPajamaBook": 1})
    ).batch(chosen)
    assert torch.equal(again.tokens, whole.tokens[chosen])
    assert torch.equal(again.document_start, whole.document_start[chosen])
    assert set(whole.sources) == {"RedPajamaC4", "RedPajamaBook"}


def test_the_orders_fingerprint_tells_what_changes_the_order(corpus):
    def fingerprint(split="train", length=32, seed=0, mixture=None):
        return SampleStream(corpus, split, length, seed, mixture).fingerprint

    others = [
        fingerprint(length=31),
        fingerprint(seed=1),
        fingerprint("test"),
        fingerprint(mixture=MixtureConfig({"RedPajamaC4": 1})),
    ]
    assert len({fingerprint(), *others}) == 5
    assert fingerprint() == fingerprint()


def collect(corpus, replicas, micro, first, steps, batch=24, prefetch=2, workers=1):
    """Tokens of `steps` steps, [steps * batch, S], put together from all replicas."""
    loaders = [
        StepLoader(
            SampleStream(corpus, "train", 20, seed=2),
            global_batch_size=batch,
            micro_batch_size=micro,
            replica=replica,
            replicas=replicas,
            first_sample=first,
            prefetch_steps=prefetch,
            workers=workers,
        )
        for replica in range(replicas)
    ]
    rows = []
    for _ in range(steps):
        for loader in loaders:
            micro_batches = next(loader)
            assert [len(m.tokens) for m in micro_batches] == [micro] * (batch // replicas // micro)
            assert [len(m.sources) for m in micro_batches] == [micro] * len(micro_batches)
            rows += [m.tokens for m in micro_batches]
    assert {loader.consumed_samples for loader in loaders} == {first + steps * batch}
    for loader in loaders:
        loader.close()
    return torch.cat(rows)


@pytest.mark.parametrize(("replicas", "micro"), [(1, 24), (1, 1), (2, 4), (3, 8), (4, 3), (8, 1), (24, 1)])
def test_the_order_does_not_depend_on_the_world(corpus, replicas, micro):
    expected = SampleStream(corpus, "train", 20, seed=2).batch(0, 5 * 24).tokens
    assert torch.equal(collect(corpus, replicas, micro, 0, 5, prefetch=1 + replicas % 3), expected)


def test_restarts_at_random_points_in_other_worlds_continue_the_order(corpus):
    rng = random.Random(3)
    expected = SampleStream(corpus, "train", 20, seed=2).batch(0, 24 * 40).tokens
    parts, step = [], 0
    while step < 40:
        steps = min(rng.randrange(1, 9), 40 - step)
        replicas, micro = rng.choice([(1, 12), (2, 3), (4, 2), (8, 3)])
        prefetch, workers = rng.randrange(1, 6), rng.randrange(1, 4)
        parts.append(collect(corpus, replicas, micro, step * 24, steps, prefetch=prefetch, workers=workers))
        step += steps
    assert torch.equal(torch.cat(parts), expected)


def test_few_open_files_and_many_threads_read_the_same(corpus):
    expected = SampleStream(corpus, "train", 20, seed=2).batch(0, 24 * 10).tokens
    narrow = Corpus.open(corpus.directory)
    narrow._files = OpenFiles(narrow._files.locate, len(narrow.manifest.shards), limit=2)
    assert torch.equal(collect(narrow, 2, 4, 0, 10, prefetch=6, workers=4), expected)


@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_slices_of_sequence_ranks_make_up_the_sample_and_read_only_their_tokens(corpus, ranks):
    stream = SampleStream(corpus, "train", 20, seed=2)
    whole = stream.batch(0, 60)
    slices = [stream.batch(0, 60, Columns.of_rank(20, rank, ranks)) for rank in range(ranks)]
    for name in ("tokens", "targets", "document_start"):
        assert torch.equal(torch.cat([getattr(part, name) for part in slices], 1), getattr(whole, name))
    settings = {"global_batch_size": 6, "micro_batch_size": 3, "replica": 0, "replicas": 1, "first_sample": 0}
    with StepLoader(stream, **settings, sequence_rank=1, sequence_ranks=ranks) as loader:
        assert torch.equal(next(loader)[1].tokens, slices[1].tokens[3:6])
    with pytest.raises(ValueError, match=r"training\.sequence_length: 20 does not divide into slices for 3"):
        StepLoader(stream, **settings, sequence_rank=1, sequence_ranks=3)
    windows = WindowStream(corpus, "validation", 64)
    parts = [windows.batch(0, windows.windows, Columns.of_rank(64, rank, 4)) for rank in range(4)]
    assert torch.equal(torch.cat([part.targets for part in parts], 1), windows.batch(0, windows.windows).targets)


def test_lanes_go_on_where_they_ended_until_a_segment_ends(corpus):
    lanes = Lanes(count=6, windows=4)
    stream = SampleStream(corpus, "train", 20, seed=2, lanes=lanes)
    steps = [stream.batch(step * 6, 6) for step in range(12)]
    sources = {source: oracle(corpus, "train", source)[0] for source in corpus.sources("train")}
    for step, batch in enumerate(steps):
        assert batch.continues.tolist() == [step % 4 > 0] * 6
        if step % 4 == 0:
            assert batch.document_start[:, 0].all()
            continue
        for lane in range(6):
            before = steps[step - 1]
            assert batch.sources[lane] == before.sources[lane]
            assert batch.tokens[lane, 0] == before.targets[lane, -1]
    row = sum((step.tokens[0].tolist() for step in steps[:4]), [])
    text = " ".join(map(str, sources[steps[0].sources[0]]))
    assert " ".join(map(str, row)) in text
    # An epoch visits every segment once.
    epoch = stream.mixture.samples_per_epoch
    origins = {(o.source, o.sample) for o in (stream.origin(i) for i in range(stream.samples_per_epoch // 24 * 24))}
    assert len(origins) == stream.samples_per_epoch // 24 * 24 and epoch * 4 == stream.samples_per_epoch
    assert stream.fingerprint != SampleStream(corpus, "train", 20, seed=2, lanes=Lanes(6, 5)).fingerprint
    with pytest.raises(ValueError, match="lanes need packing=concatenate and positive numbers"):
        SampleStream(corpus, "train", 20, seed=2, lanes=Lanes(0, 4))


def test_lanes_count_passes_in_samples_and_begin_phases_with_segments(corpus):
    lanes, order = Lanes(count=6, windows=4), OrderConfig(temperature=1.0)
    stream = open_order(corpus, order, 20, 2, 6, lanes=lanes)
    assert stream.identity["lanes"] == [6, 4]
    assert stream.sizes == {source: 4 * size for source, size in stream.mixture.sizes.items()}
    # Whole turns of all lanes, half of one, and none.
    for samples in (0, 24 * 7, 24 * 7 + 12):
        found = [stream.origin(i).source for i in range(samples)]
        counted = {source: passes * stream.sizes[source] for source, passes in stream.epochs(samples).items()}
        assert counted == pytest.approx({source: found.count(source) for source in counted})
    (rare, often), starts = sorted(stream.sizes, key=stream.sizes.get)[:2], 8
    phase = MixturePhaseConfig(from_step=starts, weights={rare: 1.0})
    stream = open_order(corpus, OrderConfig(weights={often: 1.0}, phases=[phase]), 20, 2, 6, lanes=lanes)
    sources = [set(stream.batch(step * 6, 6).sources) for step in range(2 * starts)]
    assert sources == [{often}] * starts + [{rare}] * starts


def test_samples_after_the_last_cap_are_refused(corpus):
    mixture = MixtureConfig(epoch_caps=dict.fromkeys(corpus.sources("train"), 1))
    stream = SampleStream(corpus, "train", 500, seed=2, mixture=mixture)
    assert stream.limit == sum(stream.mixture.sizes.values())
    rows = stream.batch(0, stream.limit)
    assert len(set(map(tuple, rows.tokens.tolist()))) == stream.limit
    with pytest.raises(
        ValueError, match=rf"its cap after {stream.limit} samples; sample {stream.limit} does not exist"
    ):
        stream.batch(stream.limit, 1)


def test_loader_reads_nothing_that_is_left_out(text_corpus):
    stream = SampleStream(text_corpus, "train", 8, seed=0)
    settings = {"global_batch_size": 4, "micro_batch_size": 2, "replicas": 2, "first_sample": 2}
    for replica in range(2):
        with StepLoader(stream, **settings, replica=replica, left_out=[(9, 3), (12, 5)]) as loader:
            for begins in (2, 18, 22):
                tokens = torch.cat([batch.tokens for batch in next(loader)])
                assert torch.equal(tokens, stream.batch(begins + 2 * replica, 2).tokens)
                assert loader.consumed_samples == begins + 4


def test_loader_raises_the_threads_error_and_goes_on_raising_it(text_corpus, tmp_path):
    class Broken(SampleStream):
        def batch(self, first_sample, count=None, columns=None):
            if first_sample >= 8:
                raise CorpusError("shard x is gone")
            return super().batch(first_sample, count, columns)

    stream = Broken(text_corpus, "train", 8, seed=0)
    loader = StepLoader(stream, global_batch_size=4, micro_batch_size=4, replica=0, replicas=1, first_sample=0)
    assert [len(next(loader)) for _ in range(2)] == [1, 1]
    for _ in range(2):
        with pytest.raises(CorpusError, match="shard x is gone"):
            next(loader)
    loader.close()
    assert loader.consumed_samples == 8


def test_closed_loader_leaves_no_thread_and_says_so(text_corpus):
    before = threading.active_count()
    stream = SampleStream(text_corpus, "train", 8, seed=0)
    with StepLoader(stream, global_batch_size=2, micro_batch_size=1, replica=0, replicas=1, first_sample=0) as loader:
        next(loader)
    assert threading.active_count() == before
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"global_batch_size": 10, "micro_batch_size": 4},
            "global_batch_size 10 is not a multiple of replicas 1",
        ),
        ({"micro_batch_size": 0}, "micro_batch_size 0"),
        ({"replica": 1}, "0 <= replica < replicas"),
        ({"first_sample": -1}, "first_sample >= 0"),
    ],
)
def test_impossible_loaders_are_refused(text_corpus, changes, message):
    settings = {"global_batch_size": 8, "micro_batch_size": 4, "replica": 0, "replicas": 1, "first_sample": 0}
    with pytest.raises(ValueError, match=message):
        StepLoader(SampleStream(text_corpus, "train", 8, seed=0), **{**settings, **changes})


@pytest.mark.parametrize(("length", "batch_size"), [(10, 3), (64, 1), (100_000, 4)])
@pytest.mark.parametrize("source", [None, "RedPajamaBook"])
def test_sequential_windows_predict_every_token_of_a_source_once(corpus, length, batch_size, source):
    batches = list(sequential_batches(corpus, "validation", length, batch_size, source))
    labels = [label for batch in batches for label in batch.sources]
    targets = torch.cat([batch.targets for batch in batches])
    starts = torch.cat([batch.document_start for batch in batches])
    tokens = torch.cat([batch.tokens for batch in batches])
    for label in [source] if source else corpus.sources("validation"):
        mine = [row for row, name in enumerate(labels) if name == label]
        expected, expected_starts = oracle(corpus, "validation", label)
        valid = targets[mine] != MASKED
        assert targets[mine][valid].tolist() == expected[1:]
        assert tokens[mine][valid].tolist() == expected[:-1]
        assert starts[mine][valid].tolist() == expected_starts[:-1]
        assert (tokens[mine][~valid] == corpus.eod_id).all() and not starts[mine][~valid].any()
    windows = WindowStream(corpus, "validation", length, source)
    assert (len(labels), int((targets != MASKED).sum())) == (windows.windows, windows.targets)


def test_what_the_corpus_lacks_is_named(corpus):
    with pytest.raises(CorpusError, match=r"no split 'dev'; the corpus has test, train, validation"):
        SampleStream(corpus, "dev", 8, seed=0)
    with pytest.raises(CorpusError, match=r"no source 'x' in split 'train'; it has RedPajamaBook"):
        WindowStream(corpus, "train", 8, "x")
    longest = max(corpus.tokens("train", source) for source in corpus.sources("train"))
    message = rf"no source .* has more than {longest} tokens, less than one sample of {longest} \+ 1; use a shorter"
    with pytest.raises(CorpusError, match=message):
        # Together they have more.
        SampleStream(corpus, "train", longest, seed=0)
    with pytest.raises(CorpusError, match=rf"less than a segment of 3 x {longest // 2} \+ 1; use a shorter"):
        SampleStream(corpus, "train", longest // 2, seed=0, lanes=Lanes(2, 3))
    with pytest.raises(ValueError, match="sequence_length must be at least 1, got 0"):
        SampleStream(corpus, "train", 0, seed=0)
    with pytest.raises(ValueError, match="start at 0, got -1"):
        SampleStream(corpus, "train", 8, seed=0).batch([-1])
    with pytest.raises(ValueError, match=r"weights\.nobody"):
        SampleStream(corpus, "train", 8, seed=0, mixture=MixtureConfig({"nobody": 1.0}))


def test_origin_names_the_tokens_of_a_sample(corpus):
    stream = SampleStream(corpus, "train", 33, seed=0)
    for index in (0, 17, stream.samples_per_epoch + 1):
        origin = stream.origin(index)
        entries = stream.corpus.sequence("train", origin.source).entries
        by_file = {entry.file: number for number, entry in enumerate(entries)}
        sequence = stream.corpus.sequence("train", origin.source)
        tokens = [t for file, a, b in origin.parts for t in sequence.shard(by_file[file]).tokens[a:b].tolist()]
        batch = stream.batch(index, 1)
        assert tokens == [*batch.tokens[0].tolist(), int(batch.targets[0, -1])]
        assert origin.epoch == index // stream.samples_per_epoch
