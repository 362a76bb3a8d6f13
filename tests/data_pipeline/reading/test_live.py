"""Text that is tokenized while it is read: one order for all worlds, exact resume, and refusals where it cannot be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from data_pipeline.errors import CorpusError
from data_pipeline.reading.batch import Columns
from data_pipeline.reading.live import LiveCorpus, LiveStream
from data_pipeline.reading.loader import StepLoader
from data_pipeline.sources.config import DataConfig, SplitConfig, ToleranceConfig
from data_pipeline.sources.sources import open_source
from data_pipeline.tokenizing.config import TokenizerConfig
from tests.data_pipeline.small_corpora import slimpajama_config, write_slimpajama

LENGTH, LANES = 24, 12


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_slimpajama(folder, files=5, documents=40)
    return folder


@pytest.fixture
def open_live(raw, corpus):
    tokenizer = TokenizerConfig(kind="file", path=str(corpus.folder / "tokenizer"))

    def open_stream(**changes) -> LiveStream:
        live = LiveCorpus(changes.pop("data", slimpajama_config(raw, raw).data), tokenizer, "train")
        return LiveStream(live, LENGTH, **{"seed": 1, "lanes": LANES, "max_epochs": 3, **changes})

    return open_stream


def test_lanes_hold_every_document_once_and_starts_are_where_documents_end(open_live, raw, corpus):
    stream = open_live(max_epochs=1)
    lanes: list[list[int]] = [[] for _ in range(LANES)]
    starts: list[list[bool]] = [[] for _ in range(LANES)]
    with pytest.raises(CorpusError, match=r"corpus\.max_epochs: the text was read 1 times"):
        for step in range(10_000):
            batch = stream.batch(step * LANES, LANES)
            assert batch.continues.tolist() == [step > 0] * LANES
            for lane in range(LANES):
                lanes[lane] += batch.tokens[lane].tolist()
                starts[lane] += batch.document_start[lane].tolist()
                assert batch.targets[lane, :-1].tolist() == batch.tokens[lane, 1:].tolist()
    source = open_source(slimpajama_config(raw, raw).data)
    records = [r for item in source.inputs() for r in source.read(item, lambda count: None) if r.split == "train"]
    texts = {r.text for r in records if r.text.strip()}
    whole = set()
    for tokens, begins in zip(lanes, starts, strict=True):
        places = [place for place, start in enumerate(begins) if start]
        assert places[0] == 0 and all(tokens[place] == corpus.eod_id for place in places[1:])
        for first, last in zip(places[1:], places[2:], strict=False):
            whole.add(corpus.tokenizer().decode(tokens[first + 1 : last]))
    # The last documents of a lane may not fill a window.
    assert whole <= texts and len(whole) > len(texts) - 6 * LANES


@pytest.mark.parametrize(("replicas", "micro", "first"), [(1, 12, 0), (2, 3, 5), (3, 2, 11), (4, 1, 30)])
def test_the_order_is_the_same_for_any_world_and_goes_on_exactly(open_live, replicas, micro, first):
    reference = open_live()
    expected = torch.cat([reference.batch(step * LANES, LANES).tokens for step in range(first + 4)])[first * LANES :]
    rows: list[list[torch.Tensor]] = [[] for _ in range(4)]
    for replica in range(replicas):
        settings = {"global_batch_size": LANES, "micro_batch_size": micro, "replica": replica, "replicas": replicas}
        with StepLoader(open_live(), **settings, first_sample=first * LANES) as loader:
            for step in range(4):
                rows[step] += [batch.tokens for batch in next(loader)]
            assert loader.consumed_samples == (first + 4) * LANES
    assert torch.equal(torch.cat([torch.cat(step) for step in rows]), expected)


def test_passes_differ_and_slices_and_single_samples_agree(open_live):
    stream = open_live()
    samples = stream.batch(np.arange(4 * LANES))
    halves = [open_live().batch(0, 4 * LANES, Columns.of_rank(LENGTH, rank, 2)) for rank in range(2)]
    for name in ("tokens", "targets", "document_start"):
        assert torch.equal(torch.cat([getattr(h, name) for h in halves], 1), getattr(samples, name))
    # An earlier sample, and a lane that was not asked for before.
    assert torch.equal(stream.batch([7]).tokens[0], samples.tokens[7])
    assert set(samples.sources) <= {"RedPajamaC4", "RedPajamaGithub", "RedPajamaBook"}
    assert not torch.equal(open_live(seed=2).batch(0, LANES).tokens, samples.tokens[:LANES])


def test_the_fingerprint_tells_what_changes_the_order(open_live, raw, tmp_path):
    write_slimpajama(tmp_path, files=4, documents=40)
    others = [open_live(seed=2), open_live(lanes=6), open_live(data=slimpajama_config(tmp_path, tmp_path).data)]
    assert len({open_live().fingerprint, *(stream.fingerprint for stream in others)}) == 4
    assert open_live().fingerprint == open_live().fingerprint


@pytest.fixture
def data_set(raw) -> DataConfig:
    return DataConfig(
        kind="datasets",
        path=str(raw),
        source_field="meta.redpajama_set_name",
        split=SplitConfig(rule="given"),
    )


def test_a_data_set_that_datasets_streams_resumes_where_it_lies_on_disk(open_live, data_set):
    expected = open_live(data=data_set)
    steps = [expected.batch(step * LANES, LANES).tokens for step in range(6)]
    assert torch.equal(open_live(data=data_set).batch(5 * LANES, LANES).tokens, steps[5])


def test_a_data_set_without_a_pinned_revision_is_read_once_and_refused_on_resume(open_live, data_set):
    stream = open_live(data=data_set)
    from data_pipeline.reading.live import _identity

    named = dataclasses.replace(data_set, path="someone/something")
    identity, why_not = _identity(named, stream.corpus.source)
    assert "someone/something has no pinned revision (None)" in why_not and "someone/something" in identity
    assert _identity(dataclasses.replace(named, revision="main"), stream.corpus.source)[1] is not None
    assert _identity(dataclasses.replace(named, revision="a" * 40), stream.corpus.source)[1] is None
    stream.corpus.why_not_again = why_not
    assert len(stream.batch(0, LANES).tokens) == LANES and len(stream.batch(LANES, LANES).tokens) == LANES
    with pytest.raises(CorpusError, match=r"cannot be read again: .* set data\.revision to a commit"):
        stream.batch(0, LANES)
    resumed = open_live(data=data_set)
    resumed.corpus.why_not_again = why_not
    with pytest.raises(CorpusError, match="cannot be read again"):
        resumed.batch(LANES, LANES)


def test_too_much_that_is_lost_ends_the_run_with_its_place(open_live, tmp_path):
    write_slimpajama(tmp_path, files=2)
    data = slimpajama_config(tmp_path, tmp_path).data
    path = tmp_path / "train" / "chunk1" / "example_train_0.jsonl.zst"
    whole = path.read_bytes()
    # A frame that ends early behind a whole one, whose documents come out first.
    path.write_bytes(whole + whole[:-5])
    with pytest.raises(
        CorpusError, match=r"1 damaged files, .* allows 0\. train/chunk1/example_train_0\.jsonl\.zst, record"
    ):
        read_once(open_live(max_epochs=1, data=data))
    tolerant = dataclasses.replace(data, tolerance=ToleranceConfig(damaged_files=1, rejected_fraction=0.5))
    assert read_once(open_live(max_epochs=1, data=tolerant)) > 0
    path.write_bytes(whole)
    lines = tmp_path / "train" / "lines.jsonl"
    lines.write_text('{"text": "good"}\n' + "not JSON\n" * 3)
    with pytest.raises(
        CorpusError, match=r"3 of 124 records rejected, .* train/lines\.jsonl, record 2: malformed: not JSON"
    ):
        read_once(open_live(max_epochs=1, data=data))
    # With many records it shows before the pass has ended.
    lines.write_text("not JSON\n" * 20_000)
    with pytest.raises(CorpusError, match=r"of 10000 records rejected, .* raise corpus\.live\.data\.tolerance"):
        read_once(open_live(max_epochs=1, data=data))


def read_once(stream: LiveStream) -> int:
    """How many steps one pass gives."""
    step = 0
    try:
        while True:
            stream.batch(step * LANES, LANES)
            step += 1
    except CorpusError as error:
        if "the text was read 1 times" not in str(error):
            raise
        return step


def test_text_without_a_document_of_the_split_is_refused(open_live, raw):
    data = dataclasses.replace(slimpajama_config(raw, raw).data, text_field="nothing")
    with pytest.raises(
        CorpusError, match=r"280 of 280 records rejected, .* record 1: no_text: field 'nothing': no such"
    ):
        open_live(data=data).batch(0, LANES)
    data = slimpajama_config(raw / "test", raw).data
    data = dataclasses.replace(data, split=SplitConfig(validation_fraction=0.5, test_fraction=0.49999))
    stream = open_live(data=data)
    for _ in range(2):
        with pytest.raises(CorpusError, match="no document of split 'train' was found"):
            stream.batch(0, LANES)
    with pytest.raises(ValueError, match="must be at least 1, got 24 and 0"):
        open_live(lanes=0)
