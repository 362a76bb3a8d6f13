"""Every kind of damage to a corpus is noticed before a token is served, and named."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.files import BLOCK_BYTES, hash_file
from data_pipeline.corpus.inspection import verify_corpus
from data_pipeline.corpus.manifest import Manifest
from data_pipeline.corpus.open_files import OpenFiles
from data_pipeline.corpus.shard_table import ShardEntry, ShardTable
from data_pipeline.corpus.shards import Shard, ShardBuilder
from data_pipeline.corpus.token_sequence import shard_metadata
from data_pipeline.errors import CorpusError
from data_pipeline.reading.batch import MASKED, Columns
from data_pipeline.reading.stream import SampleStream, sequential_batches
from data_pipeline.tokenizing.config import TokenizerConfig
from data_pipeline.tokenizing.tokenizer import train_sentencepiece
from tests.data_pipeline.small_corpora import TOKENIZER, random_text


@pytest.fixture
def copy(corpus, tmp_path) -> Path:
    """A copy of the corpus to damage."""
    shutil.copytree(corpus.directory, tmp_path / "copy")
    return tmp_path / "copy"


def shard_paths(folder: Path) -> list[Path]:
    return [folder / entry.file for entry in Manifest.read(folder).shards]


def read_everything(folder: Path) -> None:
    corpus = Corpus.open(folder)
    for split in corpus.splits:
        for source in corpus.sources(split):
            for _ in sequential_batches(corpus, split, 64, 16, source):
                pass


def refused(folder: Path, *words: str) -> None:
    """Opening or reading raises, with `words` in the message."""
    with pytest.raises(CorpusError) as error:
        read_everything(folder)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_an_untouched_corpus_opens_and_verifies(copy, corpus):
    assert Corpus.open(copy).fingerprint == corpus.fingerprint
    assert verify_corpus(copy) == []


def test_a_flipped_bit_anywhere_in_a_shard_is_caught_and_the_shard_named(copy):
    rng = random.Random(0)
    for path in rng.choices(shard_paths(copy), k=60):
        data = bytearray(path.read_bytes())
        place = rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
        original = path.read_bytes()
        path.write_bytes(data)
        refused(copy, str(path), "altered")
        problems = verify_corpus(copy)
        assert len(problems) == 1 and str(path) in problems[0] and "block 0" in problems[0]
        path.write_bytes(original)
    assert verify_corpus(copy) == []


def test_the_damaged_block_of_a_large_shard_is_named(tmp_path):
    rng = np.random.default_rng(0)
    builder = ShardBuilder(60000, 1)
    for _ in range(7):
        builder.add(rng.integers(2, 60000, 1_000_000), b"text")
    path = tmp_path / "large.arrow"
    hashes = builder.write(path, {})
    assert len(hashes.xxh3_64_blocks) == 4 and hash_file(path) == hashes
    data = bytearray(path.read_bytes())
    data[9 * 2**20] ^= 4
    path.write_bytes(data)
    different = [a != b for a, b in zip(hash_file(path).xxh3_64_blocks, hashes.xxh3_64_blocks, strict=True)]
    assert different == [False, False, True, False]


def write_large(corpus: Corpus, folder: Path, lengths: list[int]) -> Path:
    """A corpus of one shard of several blocks, of documents of so many tokens without their ends."""
    builder = ShardBuilder(corpus.vocab_size, corpus.eod_id)
    rng = np.random.default_rng(0)
    for length in lengths:
        builder.add(rng.integers(3, corpus.vocab_size, length), b"text")
    entry = ShardEntry("a.arrow", "train", "web", 0, len(lengths), builder.tokens, 24, 0, "", "", [])
    hashes = builder.write(folder / "a.arrow", shard_metadata(entry, corpus.manifest.tokenizer.fingerprint))
    entry = dataclasses.replace(entry, **dataclasses.asdict(hashes))
    dataclasses.replace(corpus.manifest, shards=ShardTable.from_entries([entry])).write(folder)
    shutil.copytree(corpus.folder / "tokenizer", folder / "tokenizer")
    return folder / "a.arrow"


def test_a_damaged_block_of_a_large_shard_is_caught_before_its_tokens_and_spoils_no_other(corpus, tmp_path):
    write_large(corpus, tmp_path, [1_000_000] * 6)
    flip(tmp_path / "a.arrow", 0.5)
    sequence = Corpus.open(tmp_path).sequence("train", "web")
    served = 0
    for begin in range(0, sequence.tokens - 1000, 10_000):
        out = np.zeros(1000, dtype=np.uint16)
        try:
            sequence.read(begin, out, np.zeros(1000, dtype=bool))
            served += 1
        except CorpusError as error:
            assert "a.arrow: altered: the 4 MiB block 1 (bytes 4194304 to 8388607)" in str(error)
            assert not out.any()
    # Two thirds of the file: blocks 0 and 2.
    assert 0.6 < served / (sequence.tokens / 10_000) < 0.72


def test_samples_that_are_skipped_take_no_memory(corpus, tmp_path):
    flip(write_large(corpus, tmp_path, [1_000_000] * 6), 0.5)
    sequence = Corpus.open(tmp_path).sequence("train", "web")
    places = np.arange(50) * 100
    skipped: list[int] = []
    tracemalloc.start()
    try:
        sequence.fetch(
            places,
            2_500_000 + places,
            np.full(50, 100),
            np.zeros(5000, np.uint16),
            None,
            lambda r, _: skipped.append(r),
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert skipped == list(range(50)) and peak < 5 * BLOCK_BYTES


def test_sequence_ranks_skip_a_packed_sample_alike_where_only_the_token_before_it_is_damaged(corpus, tmp_path):
    length = 1000
    path = write_large(corpus, tmp_path, [847, 4_600_000])
    # The first token of block 2 opens a sample, which goes on with a document: its first input is in block 1.
    shard = Shard(path)
    edge = (2 * BLOCK_BYTES - shard.column_places()[0]) // 2
    place = edge % length - 1
    shutil.rmtree(tmp_path / "tokenizer")
    path = write_large(corpus, tmp_path, [place, 4_600_000])
    assert Shard(path).column_places() == shard.column_places()
    stream = SampleStream(Corpus.open(tmp_path), "train", length, 1, packing="best_fit")
    origins = stream._locate(np.arange(stream.samples_per_epoch))[1]
    index = np.flatnonzero(origins == (edge - place - 1) // length)
    assert stream.origin(int(index[0])).parts[0][1] == edge
    data = bytearray(path.read_bytes())
    data[2 * BLOCK_BYTES - 10] ^= 1
    path.write_bytes(data)
    stream = SampleStream(Corpus.open(tmp_path), "train", length, 1, packing="best_fit", on_corrupt="skip")
    for rank in range(2):
        assert (stream.batch(index, columns=Columns.of_rank(length, rank, 2)).targets == MASKED).all()


def truncate(folder):
    path = shard_paths(folder)[3]
    path.write_bytes(path.read_bytes()[:-7])
    return path, "truncated"


def lengthen(folder):
    path = shard_paths(folder)[2]
    path.write_bytes(path.read_bytes() + b"\0")
    return path, "altered"


def empty_file(folder):
    path = shard_paths(folder)[0]
    path.write_bytes(b"")
    return path, "truncated: 0 bytes"


def remove(folder):
    path = shard_paths(folder)[5]
    path.unlink()
    return path, "the shard is missing"


def exchange(folder):
    first, second = shard_paths(folder)[:2]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    return first, "manifest says"


def other_tokenizer(folder):
    path = folder / "tokenizer" / "tokenizer.model"
    rng = random.Random(9)
    path.write_bytes(train_sentencepiece([random_text(rng, 4000)], TokenizerConfig(vocab_size=380)))
    return path, "not the tokenizer that wrote this corpus"


def no_tokenizer(folder):
    path = folder / "tokenizer" / "tokenizer.model"
    path.unlink()
    return path, "the corpus' tokenizer is missing"


def damaged_tokenizer(folder):
    path = folder / "tokenizer" / "tokenizer.model"
    path.write_bytes(b"\xff" * 100)
    return path, "not a SentencePiece model"


@pytest.mark.parametrize(
    "damage",
    [truncate, lengthen, empty_file, remove, exchange, other_tokenizer, no_tokenizer, damaged_tokenizer],
    ids=lambda f: f.__name__,
)
def test_damaged_files_are_named(copy, damage):
    path, words = damage(copy)
    with pytest.raises(CorpusError, match="restore|prepare") as error:
        read_everything(copy)
    assert str(path) in str(error.value) and words in str(error.value)
    problems = verify_corpus(copy)
    assert problems and str(path) in problems[0] and words in problems[0]


def edit_manifest(folder: Path, old: str, new: str) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"eod_id": 2', '"eod_id": 3', "altered after it was written"),
        (
            '"format_version": 2',
            '"format_version": 1',
            "(1 listed the shards in manifest.json itself, 2 in shards.arrow)",
        ),
        (
            '"format_version": 2',
            '"format_version": 99',
            "format_version 99; this version of xlstm-pretrain reads 2; a later",
        ),
        ('"format": "xlstm-pretrain corpus"', '"format": "other"', "not a corpus manifest"),
        ('"fingerprint": "', '"fingerprint": "0', "altered after it was written"),
        ("{", "", "not JSON"),
    ],
)
def test_an_altered_manifest_is_refused(copy, old, new, words):
    edit_manifest(copy, old, new)
    refused(copy, "manifest.json", words)


def test_missing_and_unfinished_and_empty_corpora_are_refused(copy, tmp_path):
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no such folder", "prepare")
    (copy / "manifest.json").unlink()
    refused(copy, str(copy), "not a finished corpus", "restore the file or prepare the corpus again elsewhere")
    (tmp_path / "text").mkdir()
    refused(tmp_path / "text", "not a finished corpus; it is empty; prepare a corpus", f"output={tmp_path}/text")
    (tmp_path / "text" / "a.jsonl").touch()
    refused(tmp_path / "text", "not a finished corpus", f"source={tmp_path}/text ... output=ELSEWHERE")
    (tmp_path / "text" / "preparing").mkdir()
    refused(tmp_path / "text", "its preparation goes on with the same command", f"output={tmp_path}/text")


def test_a_manifest_without_shards_is_an_empty_corpus(copy):
    dataclasses.replace(Manifest.read(copy), shards=ShardTable.from_entries([])).write(copy)
    refused(copy, "the corpus is empty")


def test_a_signed_manifest_with_unknown_keys_is_refused(copy):
    from data_pipeline.corpus.manifest import fingerprint_of

    document = json.loads((copy / "manifest.json").read_text())
    del document["fingerprint"]
    document["surprise"] = 1
    document["fingerprint"] = fingerprint_of(document)
    (copy / "manifest.json").write_text(json.dumps(document))
    refused(copy, "manifest.json", "keys missing or unknown", "surprise")


def test_altered_lists_are_reported_by_verify(copy):
    for name in ("inputs.jsonl", "report.jsonl"):
        path = copy / name
        path.write_bytes(path.read_bytes() + b"{}\n")
        assert verify_corpus(copy)[-1] == f"{path}: altered after it was written (sha256 differs)"
    (copy / "inputs.jsonl").unlink()
    assert verify_corpus(copy)[0] == f"{copy / 'inputs.jsonl'}: missing"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "missing"),
        ("{", "damaged, names no eod_token"),
        ("[]", "damaged, names no eod_token"),
        ('{"format_version": 1}', "damaged, names no eod_token"),
        ('{"eod_token": "<s>"}', "altered: it names <s>, the manifest </s>"),
    ],
)
def test_an_altered_end_of_document_token_beside_the_tokenizer_is_reported(copy, content, words):
    path = copy / "tokenizer" / "end_of_document.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    (problem,) = verify_corpus(copy)
    assert problem.startswith(f"{path}: {words}")


def sign_as(folder: Path, entry, path: Path) -> None:
    """Put the file `path` at the place of `entry` and record its checksums, as a careless repair would."""
    manifest = Manifest.read(folder)
    shutil.copy(path, folder / entry.file)
    hashes = dataclasses.asdict(hash_file(path))
    shards = [dataclasses.replace(e, **hashes) if e.file == entry.file else e for e in manifest.shards]
    dataclasses.replace(manifest, shards=ShardTable.from_entries(shards)).write(folder)


def test_a_stray_shard_is_recognised_even_with_a_matching_checksum(copy):
    first, second = [e for e in Manifest.read(copy).shards if e.split == "train" and e.source == "RedPajamaC4"][:2]
    sign_as(copy, first, copy / second.file)
    corpus = Corpus.open(copy)
    with pytest.raises(CorpusError, match=rf"its unit is '{second.unit}', the manifest says '{first.unit}'"):
        corpus.sequence("train", "RedPajamaC4").shard(0)
    book = next(e for e in Manifest.read(copy).shards if e.split == "train" and e.source == "RedPajamaBook")
    sign_as(copy, first, copy / book.file)
    assert "its source is 'RedPajamaBook'" in " ".join(verify_corpus(copy))


def test_checking_sizes_alone_leaves_flipped_bits_to_verify(copy):
    path = shard_paths(copy)[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    Corpus.open(copy, check="size")
    assert str(path) in verify_corpus(copy)[0]
    with pytest.raises(CorpusError, match=r"the 4 MiB block 0 \(bytes 0 to \d+\) has another content"):
        Corpus.open(copy, check="hash")
    path.unlink()
    Corpus.open(copy, check="none")
    with pytest.raises(CorpusError, match="the shard is missing"):
        Corpus.open(copy)
    with pytest.raises(ValueError, match="one of none, size, hash, got 'all'"):
        Corpus.open(copy, check="all")


def test_a_manifest_with_other_counts_than_the_shard_is_refused(copy):
    manifest = Manifest.read(copy)
    changed = dataclasses.replace(manifest.shards[0], tokens=manifest.shards[0].tokens + 1)
    table = ShardTable.from_entries([changed, *manifest.shards[1:]])
    dataclasses.replace(manifest, shards=table).write(copy)
    assert "tokens, the manifest says" in verify_corpus(copy)[0]


def write_shard(path: Path, vocab_size: int, eod_id: int) -> Shard:
    builder = ShardBuilder(vocab_size, eod_id)
    builder.add(np.array([5, 6, vocab_size - 1]), b"abc")
    builder.write(path, {"source": "x"})
    return Shard(path)


def test_structural_faults_of_a_shard(tmp_path):
    shard = write_shard(tmp_path / "a.arrow", 400, 2)
    assert shard.problems(400, 2) == []
    assert shard.problems(399, 2) == ["token 2: id 399 is outside the vocabulary of 399"]
    assert shard.problems(400, 3) == ["document 0 does not end with the end-of-document id 3"]
    assert shard.problems(70_000, 2) == ["token ids are uint16, not uint32"]
    assert write_shard(tmp_path / "b.arrow", 70_000, 2).tokens.dtype == np.uint32
    assert write_shard(tmp_path / "c.arrow", 65_536, 2).tokens.tolist() == [5, 6, 65_535, 2]


def test_an_id_outside_the_vocabulary_is_never_written():
    for ids in ([400], [-1]):
        with pytest.raises(CorpusError, match="outside its vocabulary of 400"):
            ShardBuilder(400, 2).add(np.array(ids), b"")


def test_a_file_that_is_no_shard_is_named(tmp_path):
    path = tmp_path / "x.arrow"
    path.write_bytes(b"ARROW1 but not really")
    with pytest.raises(CorpusError, match=r"x\.arrow: not a readable shard"):
        Shard(path)


def test_the_vocabulary_of_the_fixture_is_what_was_asked_for(corpus):
    assert corpus.vocab_size == TOKENIZER.vocab_size


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("damage", [lambda path: flip(path, 0.3), Path.unlink], ids=["flipped", "vanished"])
def test_samples_of_a_damaged_shard_are_skipped_alike_by_all_ranks_or_stop_the_run(copy, packing, damage, caplog):
    settings = {"packing": packing}
    whole = SampleStream(Corpus.open(copy), "train", 50, 1, **settings)
    count = whole.samples_per_epoch
    expected = whole.batch(0, count)
    entry = Corpus.open(copy).sequence("train", "RedPajamaC4").entry(2)
    affected = [i for i in range(count) if entry.file in [file for file, _, _ in whole.origin(i).parts]]
    damage(copy / entry.file)
    with pytest.raises(CorpusError, match=entry.file):
        SampleStream(Corpus.open(copy, check="none"), "train", 50, 1, **settings).batch(0, count)
    stream = SampleStream(Corpus.open(copy, check="none"), "train", 50, 1, **settings, on_corrupt="skip")
    batch = stream.batch(0, count)
    masked = [i for i in range(count) if bool((batch.targets[i] == -100).all())]
    assert masked == affected and len(affected) > 1 and stream.damage.skipped == len(affected)
    kept = [i for i in range(count) if i not in affected]
    for name in ("tokens", "targets", "document_start"):
        assert torch.equal(getattr(batch, name)[kept], getattr(expected, name)[kept])
    assert not batch.document_start[affected].any()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "samples are skipped" in line and entry.file in line
    halves = [stream.batch(0, count, Columns.of_rank(50, rank, 2)).targets for rank in range(2)]
    assert torch.equal(torch.cat(halves, 1), batch.targets)


def test_a_shard_truncated_while_it_is_read_is_an_error_with_its_name(copy):
    corpus = Corpus.open(copy)
    stream = SampleStream(corpus, "train", 50, 1)
    stream.batch(0, stream.samples_per_epoch)
    path = copy / corpus.sequence("train", "RedPajamaC4").entry(0).file
    os.truncate(path, 600)
    with pytest.raises(CorpusError, match=rf"{path.name}: truncated while it was in use, to 600 bytes"):
        stream.batch(0, stream.samples_per_epoch)
    assert corpus.sequence("train", "RedPajamaC4").entry(0).tokens > 4 * 50
    skipping = SampleStream(corpus, "train", 50, 1, on_corrupt="skip")
    skipping.batch(0, skipping.samples_per_epoch)
    # However many samples touch it, and wherever.
    assert skipping.damage.skipped > 2 and len(skipping.damage.problems) == 1


def test_an_unknown_policy_for_damage_is_refused(copy):
    with pytest.raises(ValueError, match=r"on_corrupt: no such choice \('ignore'\); choose one of fail, skip"):
        SampleStream(Corpus.open(copy), "train", 50, 1, on_corrupt="ignore")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: {"tokenizer": dataclasses.replace(m.tokenizer, eod_id=3)}, "its tokenizer.eod_id is 3"),
        (lambda m: {"tokenizer": dataclasses.replace(m.tokenizer, vocab_size=500)}, "its tokenizer.vocab_size is 500"),
        (lambda m: {"token_dtype": "float16"}, "token_dtype 'float16' or block_bytes 4194304 cannot be"),
        (lambda m: {"block_bytes": 0}, "token_dtype 'uint16' or block_bytes 0 cannot be"),
    ],
)
def test_a_manifest_that_was_altered_and_signed_again_is_refused(copy, change, words):
    manifest = Manifest.read(copy)
    dataclasses.replace(manifest, **change(manifest)).write(copy)
    refused(copy, str(copy / "manifest.json"), words)


def test_a_library_that_encodes_otherwise_than_the_one_that_wrote_is_refused(copy):
    manifest = Manifest.read(copy)
    tokenizer = dataclasses.replace(manifest.tokenizer, probe_sha256="0" * 64, library_version="0.0.1")
    dataclasses.replace(manifest, tokenizer=tokenizer).write(copy)
    refused(copy, "tokenizer.model: sentencepiece", "encodes text differently from sentencepiece 0.0.1", "install that")


def test_another_file_in_the_place_of_a_shard_is_not_read_as_the_one_that_was_compared(copy):
    corpus = Corpus.open(copy)
    corpus._files = OpenFiles(corpus._files.locate, len(corpus.manifest.shards), limit=1)
    stream = SampleStream(corpus, "train", 50, 1)
    stream.batch(0, stream.samples_per_epoch)
    path = copy / corpus.sequence("train", "RedPajamaC4").entry(0).file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").rename(path)
    with pytest.raises(CorpusError, match=rf"{path.name}: altered: another file since this process first read from it"):
        stream.batch(0, stream.samples_per_epoch)


def test_a_machine_without_room_for_open_files_is_no_damage(copy):
    stream = SampleStream(Corpus.open(copy), "train", 50, 1, on_corrupt="skip")
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The limit is one on the numbers of descriptors, not on how many there are: under 0 none can be opened.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(CorpusError, match="Too many open files"):
            stream.batch(0, stream.samples_per_epoch)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert stream.damage.problems == []
