"""Best-fit packing against a plain oracle: every token once, no fitting document cut, little padding."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import CorpusError
from data_pipeline.ordering import packing
from data_pipeline.ordering.mixture import MixtureConfig
from data_pipeline.ordering.packing import document_blocks, open_packing_plan, pack_block
from data_pipeline.reading.batch import MASKED, Columns
from data_pipeline.reading.stream import SampleStream


@pytest.fixture
def stream(corpus, tmp_path):
    def open_stream(length: int, **changes) -> SampleStream:
        return SampleStream(corpus, "train", length, 3, packing="best_fit", packing_directory=tmp_path, **changes)

    return open_stream


def documents(corpus: Corpus, source: str) -> list[list[int]]:
    sequence = corpus.sequence("train", source)
    shards = [sequence.shard(number) for number in range(sequence.shards)]
    return [s.tokens[s.offsets[d] : s.offsets[d + 1]].tolist() for s in shards for d in range(s.documents)]


def unpacked(corpus: Corpus, batch) -> dict[str, list[tuple[int, ...]]]:
    """The pieces of each source: (first input, targets...) of each run of targets between document starts."""
    pieces: dict[str, list[tuple[int, ...]]] = {}
    rows = zip(batch.sources, batch.tokens.tolist(), batch.targets.tolist(), batch.document_start.tolist(), strict=True)
    for source, tokens, targets, starts in rows:
        assert starts[0]
        begins = [place for place, start in enumerate(starts) if start]
        for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
            piece = targets[begin:end]
            if piece[0] == MASKED:
                assert set(piece) == {MASKED} and set(tokens[begin:end]) == {corpus.eod_id} and end == len(tokens)
                continue
            assert tokens[begin + 1 : end] == piece[:-1]
            pieces.setdefault(source, []).append((tokens[begin], *piece))
    return pieces


@pytest.mark.parametrize("length", [8, 64, 500])
def test_an_epoch_holds_every_document_once_and_cuts_none_that_fits(corpus, stream, length):
    packed = stream(length)
    pieces = unpacked(corpus, packed.batch(0, packed.samples_per_epoch))
    for source in corpus.sources("train"):
        expected = []
        for document in documents(corpus, source):
            for begin in range(0, len(document), length):
                before = corpus.eod_id if begin == 0 else document[begin - 1]
                expected.append((before, *document[begin : begin + length]))
        assert sorted(pieces[source]) == sorted(expected)


@pytest.mark.parametrize("length", [64, 500])
def test_statistics_agree_with_a_count_of_documents(corpus, stream, length):
    plan = stream(length).packing_plan
    for source in corpus.sources("train"):
        lengths = [len(document) for document in documents(corpus, source)]
        found = plan.statistics[source]
        ends = np.cumsum(lengths)
        cut = (ends - lengths) // length != (ends - 1) // length
        assert (found.documents, found.tokens) == (len(lengths), sum(lengths))
        assert found.padding == found.samples * length - sum(lengths) >= 0
        assert found.cut == sum(n > length for n in lengths)
        assert found.concatenated_cut == cut.sum()
        assert found.concatenated_cut_though_fitting == (cut & (np.array(lengths) <= length)).sum()
        # No two samples of a block could be one.
        assert found.samples <= 2 * sum(lengths) / length + 1


def test_realistic_lengths_leave_less_than_a_hundredth_of_padding():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6.3, 1.2, 4000).astype(np.int64) + 2, 100_000)
    ends = np.cumsum(lengths)
    pieces, samples = pack_block(ends - lengths, ends, 2048)
    assert len(samples) * 2048 / ends[-1] < 1.01 and samples[-1] == len(pieces)


def test_blocks_hold_whole_documents_in_order_and_do_not_depend_on_shards(corpus, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 400)
    sequence = corpus.sequence("train", "RedPajamaC4")
    blocks = list(document_blocks(sequence))
    ends = np.cumsum([len(document) for document in documents(corpus, "RedPajamaC4")])
    assert np.concatenate([block[1:] for block in blocks]).tolist() == ends.tolist()
    assert all(block[-1] - block[0] >= 400 for block in blocks[:-1]) and len(blocks) > 5
    assert all(block[-2] - block[0] < 400 for block in blocks)
    assert [block[0] for block in blocks[1:]] == [block[-1] for block in blocks[:-1]]


@pytest.mark.parametrize("ranks", [2, 4])
def test_slices_of_sequence_ranks_make_up_the_sample(stream, ranks):
    packed = stream(64)
    indices = np.arange(40)
    whole = packed.batch(indices)
    slices = [packed.batch(indices, columns=Columns.of_rank(64, rank, ranks)) for rank in range(ranks)]
    for name in ("tokens", "targets", "document_start"):
        together = np.concatenate([getattr(part, name).numpy() for part in slices], axis=1)
        assert np.array_equal(together, getattr(whole, name).numpy()), name


def test_many_processes_may_open_one_plan_and_a_mixture_counts_its_samples(corpus, stream, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda _: open_packing_plan(corpus, "train", 100, tmp_path / "new"), range(4)))
    assert len({plan.fingerprint for plan in plans}) == 1
    assert len(list((tmp_path / "new").glob("*/plan.json"))) == 1
    mixed = stream(64, mixture=MixtureConfig({"RedPajamaC4": 1, "RedPajamaBook": 1}))
    assert mixed.mixture.sizes["RedPajamaC4"] == mixed.packing_plan.samples("RedPajamaC4")
    assert mixed.fingerprint != stream(64).fingerprint
    assert stream(64).fingerprint != SampleStream(corpus, "train", 64, 3).fingerprint


def test_origin_names_the_documents_of_a_packed_sample(corpus, stream):
    packed = stream(64)
    origin = packed.origin(5)
    tokens = sum(end - first for _, first, end in origin.parts)
    assert tokens == int((packed.batch(5, 1).targets != MASKED).sum())


def test_a_damaged_plan_is_refused_and_named(corpus, stream, tmp_path):
    plan = stream(64).packing_plan
    (pieces,) = [path for path in plan.folder.glob("000.pieces")]
    data = bytearray(pieces.read_bytes())
    data[len(data) // 2] ^= 1
    pieces.write_bytes(data)
    with pytest.raises(CorpusError, match=r"000\.pieces: altered.*delete .* to plan again"):
        stream(64).batch(0, 200)
    pieces.write_bytes(data[:-8])
    with pytest.raises(CorpusError, match=r"000\.pieces: missing or of another size"):
        stream(64)
    path = plan.folder / "plan.json"
    path.write_text(path.read_text().replace('"documents":', '"documents": 1', 1))
    with pytest.raises(CorpusError, match=r"plan\.json: altered"):
        stream(64)
    shutil.rmtree(plan.folder)
    assert stream(64).packing_plan.fingerprint == plan.fingerprint


def test_what_cannot_be_packed_is_refused(corpus, tmp_path):
    with pytest.raises(
        ValueError, match=r"packing: no such choice \('first_fit'\); choose one of concatenate, best_fit"
    ):
        SampleStream(corpus, "train", 8, 0, packing="first_fit")
    with pytest.raises(ValueError, match="between 1 and 8388607, got 9000000"):
        open_packing_plan(corpus, "train", 9_000_000, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=r"cannot be written .* set corpus\.packing_directory"):
        open_packing_plan(corpus, "train", 64, tmp_path / "file")
