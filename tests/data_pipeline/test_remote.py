"""Corpora on other file systems, through a cache: the same samples, bounded, repaired, and with clear errors."""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from data_pipeline import remote
from data_pipeline.corpus import Corpus
from data_pipeline.errors import CorpusError
from data_pipeline.remote import CacheSettings, is_remote
from data_pipeline.stream import SampleStream

MIB = 2**20


@pytest.fixture
def url(corpus, tmp_path):
    """The corpus behind fsspec, as a folder that a test may damage."""
    shutil.copytree(corpus.directory, tmp_path / "store")
    return f"file://{tmp_path / 'store'}"


@pytest.fixture
def cache(tmp_path):
    return CacheSettings(tmp_path / "cache", 64 * MIB)


def samples(where: str | Path, cache: CacheSettings | None = None, **changes) -> torch.Tensor:
    stream = SampleStream(Corpus.open(where, cache=cache), "train", 20, 1, **changes)
    return stream.batch(0, stream.samples_per_epoch).tokens


def cached_files(cache: CacheSettings) -> list[Path]:
    return sorted(cache.directory.glob("*/shards/*.arrow"))


def test_a_remote_corpus_gives_the_samples_of_the_local_one(corpus, url, cache, tmp_path):
    assert torch.equal(samples(url, cache), samples(corpus.directory))
    assert Corpus.open(url, cache=cache).fingerprint == corpus.fingerprint
    packed = samples(url, cache, packing="best_fit")
    assert torch.equal(packed, samples(corpus.directory, packing="best_fit", packing_directory=tmp_path / "plans"))
    # The second time nothing is fetched.
    for shard in (tmp_path / "store" / "shards").rglob("*.arrow"):
        shard.unlink()
    assert torch.equal(samples(url, cache), samples(corpus.directory))


def test_any_fsspec_file_system_will_do(corpus, cache):
    memory = fsspec.filesystem("memory")
    memory.put(str(corpus.directory), "/corpora/small", recursive=True)
    try:
        assert is_remote("memory://corpora/small") and not is_remote("/corpora/small")
        assert torch.equal(samples("memory://corpora/small", cache), samples(corpus.directory))
    finally:
        memory.rm("/corpora", recursive=True)


def test_many_processes_share_a_cache_that_is_too_small(large_store, tmp_path):
    url, expected = large_store
    cache = CacheSettings(tmp_path / "small cache", 9 * MIB)
    with ProcessPoolExecutor(4) as pool:
        jobs = [pool.submit(_read_large, url, cache, seed) for seed in range(4)]
        assert [job.result() for job in jobs] == [expected] * 4
    held = sum(path.stat().st_blocks * 512 for path in cached_files(cache))
    assert held < 9 * MIB < sum(path.stat().st_size for path in Path(url[7:]).rglob("*.arrow"))


def _read_large(url: str, cache: CacheSettings, seed: int) -> int:
    """Sum of all tokens, read in another order for each seed."""
    corpus = Corpus.open(url, cache=cache)
    sequence = corpus.sequence("train", "web")
    length, total = 50_000, 0
    begins = np.arange(0, sequence.tokens, length)
    for begin in np.random.default_rng(seed).permutation(begins).tolist():
        out = np.empty(min(length, sequence.tokens - begin), dtype=np.uint16)
        sequence.read(begin, out, np.zeros(len(out), dtype=bool))
        total += int(out.sum(dtype=np.int64))
    return total


@pytest.fixture
def large_store(corpus, tmp_path) -> tuple[str, int]:
    """A corpus of 20 shards of 1 MiB, and the sum of its tokens."""
    import dataclasses

    from data_pipeline.manifest import ShardEntry, ShardTable
    from data_pipeline.shards import ShardBuilder
    from data_pipeline.token_sequence import shard_metadata

    folder = tmp_path / "large"
    shutil.copytree(corpus.directory / "tokenizer", folder / "tokenizer")
    rng = np.random.default_rng(0)
    entries, total = [], 0
    for number in range(20):
        builder = ShardBuilder(corpus.vocab_size, corpus.eod_id)
        for _ in range(100):
            ids = rng.integers(3, corpus.vocab_size, 5_000)
            builder.add(ids, b"")
            total += int(ids.sum()) + corpus.eod_id
        entry = ShardEntry(f"{number}.arrow", "train", "web", number, 100, builder.tokens, 0, 0, "", "", [])
        hashes = builder.write(folder / entry.file, shard_metadata(entry, corpus.manifest.tokenizer.fingerprint))
        entries.append(dataclasses.replace(entry, **dataclasses.asdict(hashes)))
    dataclasses.replace(corpus.manifest, shards=ShardTable.from_entries(entries)).write(folder)
    return f"file://{folder}", total


def test_damage_in_the_cache_is_repaired_and_at_the_source_is_named(corpus, url, cache, tmp_path):
    expected = samples(url, cache)
    for path in cached_files(cache):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    truncated = cached_files(cache)[0]
    truncated.write_bytes(truncated.read_bytes()[:100])
    assert torch.equal(samples(url, cache), expected)
    shard = next((tmp_path / "store" / "shards" / "train").glob("RedPajamaC4*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    shutil.rmtree(cache.directory)
    with pytest.raises(CorpusError, match=rf"file://.*{shard.name}: altered: the 4 MiB block 0"):
        samples(url, cache)
    shard.write_bytes(data[:-1])
    with pytest.raises(CorpusError, match=rf"{shard.name}: truncated"):
        samples(url, cache)
    shard.unlink()
    with pytest.raises(CorpusError, match=rf"{shard.name}: missing"):
        samples(url, cache)
    masked = SampleStream(Corpus.open(url, cache=cache), "train", 20, 1, on_corrupt="skip")
    masked.batch(0, masked.samples_per_epoch)
    assert masked.damage.skipped > 0 and shard.name in masked.damage.problems[0]


class Flaky:
    """A file system whose requests fail now and then."""

    def __init__(self, system, failures: int):
        self.system, self.failures = system, failures

    def cat_file(self, *arguments):
        if self.failures > 0:
            self.failures -= 1
            raise ConnectionError("connection reset")
        return self.system.cat_file(*arguments)


def test_a_network_that_fails_for_a_moment_is_tried_again_and_then_named(corpus, url, cache, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    opened = Corpus.open(url, cache=cache)
    opened._files.remote._system = Flaky(opened._files.remote._system, 3)
    sequence = opened.sequence("train", "RedPajamaC4")
    assert sequence.shard(0).documents == sequence.entry(0).documents
    opened._files.remote._system.failures = 4
    with pytest.raises(CorpusError, match=r"cannot be fetched after 4 attempts \(ConnectionError: connection reset\)"):
        sequence.shard(1)


def test_a_full_disk_first_empties_the_cache_and_then_is_named(corpus, url, cache, monkeypatch):
    opened = Corpus.open(url, cache=cache)
    sequence = opened.sequence("train", "RedPajamaC4")
    sequence.shard(0)
    real, failures = os.pwrite, [1]

    def full(descriptor, data, offset):
        if failures[0] > 0:
            failures[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(remote.os, "pwrite", full)
    sequence.shard(1)
    assert len(cached_files(cache)) == 1
    failures[0] = 2
    with pytest.raises(CorpusError, match=r"the disk of the cache is full .* lower corpus\.cache_gib \(now 0\.0625\)"):
        sequence.shard(2)


def test_what_a_cache_cannot_be_is_refused(url, tmp_path):
    with pytest.raises(CorpusError, match="needs a cache on a local disk; set corpus.cache_directory"):
        Corpus.open(url)
    with pytest.raises(CorpusError, match=r"corpus\.cache_gib: .* is less than eight blocks"):
        Corpus.open(url, cache=CacheSettings(tmp_path / "cache", 100))
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=r"the cache cannot be used \(Not a directory\); set corpus\.cache_directory"):
        Corpus.open(url, cache=CacheSettings(tmp_path / "file", 64 * MIB))
    with pytest.raises(CorpusError, match="cannot be opened"):
        Corpus.open("nonsense://x", cache=CacheSettings(tmp_path / "cache", 64 * MIB))
    with pytest.raises(CorpusError, match=r"manifest\.json: missing"):
        Corpus.open(f"file://{tmp_path}/nowhere", cache=CacheSettings(tmp_path / "cache", 64 * MIB))
