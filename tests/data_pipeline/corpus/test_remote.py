"""Corpora on other file systems, through a cache: the same samples, bounded, repaired, and with clear errors."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from data_pipeline import network
from data_pipeline.corpus import file_systems, remote
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.files import hash_file
from data_pipeline.corpus.remote import CacheSettings, is_remote
from data_pipeline.corpus.shard_table import ShardTable
from data_pipeline.errors import CorpusError, ReadingError
from data_pipeline.reading.stream import SampleStream
from tests.runs import PATIENCE, ROOT

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


@pytest.mark.slow
def test_many_processes_share_a_cache_that_is_too_small(large_store, tmp_path):
    url, expected = large_store
    cache = CacheSettings(tmp_path / "small cache", 9 * MIB)
    with ProcessPoolExecutor(4) as pool:
        jobs = [pool.submit(_read_large, url, cache, seed) for seed in range(4)]
        assert [job.result() for job in jobs] == [expected] * 4
    held = sum(path.stat().st_blocks * 512 for path in cached_files(cache))
    assert held < 9 * MIB < sum(path.stat().st_size for path in Path(url[7:]).rglob("*.arrow"))


def test_all_corpora_of_a_cache_together_keep_to_its_limit(large_store, tmp_path):
    url, expected = large_store
    shutil.copytree(url[7:], tmp_path / "second")
    cache = CacheSettings(tmp_path / "one cache", 9 * MIB)
    # What only looks like a cached shard is no business of the cache.
    others = [cache.directory / name for name in ("corpus/shards/0.arrow", f"{'a' * 16}/shards/0.arrow")]
    for path in others:
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(MIB))
        os.utime(path, (0, 0))
    for where in (url, f"file://{tmp_path / 'second'}"):
        assert _read_large(where, cache, 0) == expected
    cached = [path for path in cached_files(cache) if path not in others]
    assert sum(path.stat().st_blocks * 512 for path in cached) < 9 * MIB
    assert all(path.exists() for path in others)


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
    from data_pipeline.corpus.shard_table import ShardEntry, ShardTable
    from data_pipeline.corpus.shards import ShardBuilder
    from data_pipeline.corpus.token_sequence import shard_metadata

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
    monkeypatch.setattr(network, "FIRST_WAIT_SECONDS", 0.001)
    opened = Corpus.open(url, cache=cache)
    opened._files.remote._system = Flaky(opened._files.remote._system, 5)
    sequence = opened.sequence("train", "RedPajamaC4")
    assert sequence.shard(0).documents == sequence.entry(0).documents
    opened._files.remote._system.failures = 10**6
    opened._files.remote._network = network.NetworkConfig(total_seconds=0.1)
    words = r"cannot be fetched: \d+ attempts in 0 s, the last of them: ConnectionError: connection reset \(corpus.netw"
    with pytest.raises(ReadingError, match=words):
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
    monkeypatch.setattr(file_systems, "FIRST_WAIT_SECONDS", 0.001)
    sequence.shard(1)
    assert len(cached_files(cache)) == 1
    # The space of what was dropped is free only once nothing has it open.
    assert all(os.fstat(found.number).st_nlink for found in opened._files._open.values())
    failures[0] = remote.ATTEMPTS
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


def test_another_corpus_at_the_same_url_leaves_what_a_running_process_has_compared(corpus, url, cache, tmp_path):
    stream = SampleStream(Corpus.open(url, cache=cache), "train", 20, 1)
    expected = stream.batch(0, stream.samples_per_epoch)
    store = tmp_path / "store"
    # The same names and sizes, another content.
    entries = list(corpus.manifest.shards)
    for number, entry in enumerate(entries):
        data = bytearray((store / entry.file).read_bytes())
        data[len(data) // 2] ^= 1
        (store / entry.file).write_bytes(data)
        entries[number] = dataclasses.replace(entry, **dataclasses.asdict(hash_file(store / entry.file)))
    dataclasses.replace(corpus.manifest, shards=ShardTable.from_entries(entries)).write(store)
    assert not torch.equal(samples(url, cache), expected.tokens)
    assert torch.equal(stream.batch(0, stream.samples_per_epoch).tokens, expected.tokens)


def test_a_process_that_opens_a_new_cached_file_late_does_not_empty_it(corpus, url, cache, monkeypatch):
    expected = samples(corpus.directory)
    first, second = (Corpus.open(url, cache=cache) for _ in range(2))
    stream = SampleStream(first, "train", 20, 1)
    real = os.ftruncate

    def held_up(descriptor, size):
        # Between this process' look at the new file and what it does about it, the other fills and compares it.
        monkeypatch.setattr(remote.os, "ftruncate", real)
        assert torch.equal(stream.batch(0, stream.samples_per_epoch).tokens, expected)
        real(descriptor, size)
        assert torch.equal(stream.batch(0, stream.samples_per_epoch).tokens, expected)

    monkeypatch.setattr(remote.os, "ftruncate", held_up)
    second.sequence("train", "RedPajamaC4").shard(0)
    assert remote.os.ftruncate is real


def test_a_shard_that_is_short_or_gone_at_the_source_is_named(corpus, url, cache, tmp_path):
    first, second = (entry.file for entry in corpus.sequence("train", "RedPajamaC4").entries[:2])
    os.truncate(tmp_path / "store" / first, 600)
    (tmp_path / "store" / second).unlink()
    sequence = Corpus.open(url, cache=cache).sequence("train", "RedPajamaC4")
    with pytest.raises(CorpusError, match=rf"{url}/{first}: truncated: bytes 0 to \d+ are not all there"):
        sequence.shard(0)
    with pytest.raises(CorpusError, match=rf"{url}/{second}: missing; restore it"):
        sequence.shard(1)


def test_bytes_that_arrive_damaged_never_reach_the_cache(corpus, url, cache):
    opened = Corpus.open(url, cache=cache)
    sequence = opened.sequence("train", "RedPajamaC4")
    remote_corpus, row = opened._files.remote, int(sequence._rows[0])
    descriptor = remote_corpus.open(row)
    remote_corpus.fill(row, 0, descriptor, lambda: False, lambda: None)
    held = os.pread(descriptor, 2**22, 0)
    remote_corpus._system = Damaging(remote_corpus._system)
    with pytest.raises(CorpusError, match=r"altered: the 4 MiB block 0"):
        remote_corpus.fill(row, 0, descriptor, lambda: False, lambda: None)
    assert os.pread(descriptor, 2**22, 0) == held
    os.close(descriptor)


class Damaging(Flaky):
    """A file system that delivers one bit wrong."""

    def __init__(self, system):
        super().__init__(system, 0)

    def cat_file(self, *arguments):
        data = bytearray(self.system.cat_file(*arguments))
        data[len(data) // 2] ^= 1
        return bytes(data)


FULL = """
import resource, sys
from pathlib import Path
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import CorpusError, ReadingError
from data_pipeline.corpus.remote import CacheSettings
from data_pipeline.reading.stream import SampleStream
corpus = Corpus.open(sys.argv[1], cache=CacheSettings(Path(sys.argv[2]), 2**26))
stream = SampleStream(corpus, "train", 20, 1, on_corrupt="skip")
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    stream.batch(0, stream.samples_per_epoch)
except CorpusError as error:
    print(error, stream.damage.problems)
"""


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_stops_a_run_that_skips_damage(url, cache):
    command = [sys.executable, "-c", FULL, url, str(cache.directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert done.stdout.endswith("the cache cannot be used (File too large); set corpus.cache_directory []\n"), done


CROSSED = """
import sys, threading, time
from pathlib import Path
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.remote import CacheSettings

url, cache, signals, held, wanted = sys.argv[1:]
signals = Path(signals)


class Waiting:
    def __init__(self, system):
        self.system = system

    def cat_file(self, path, *arguments):
        if threading.current_thread().name == "holds":
            (signals / f"held {held}").touch()
            while not (signals / "go on").exists():
                time.sleep(0.01)
        return self.system.cat_file(path, *arguments)


corpus = Corpus.open(url, cache=CacheSettings(Path(cache), 2**26))
corpus._files.remote._system = Waiting(corpus._files.remote._system)
sequence = corpus.sequence("train", "web")
threading.Thread(target=sequence.shard, args=(int(held),), name="holds", daemon=True).start()
while not all((signals / f"held {number}").exists() for number in (held, wanted)):
    time.sleep(0.01)
threading.Timer(1.0, (signals / "go on").touch).start()
print(sequence.shard(int(wanted)).documents)
"""


@pytest.mark.slow
def test_threads_of_two_ranks_wait_for_blocks_that_the_other_rank_fetches(large_store, tmp_path):
    url, _ = large_store
    remote = Corpus.open(url, cache=CacheSettings(tmp_path / "crossed", 64 * MIB))._files.remote
    # Two blocks that share a lock, as few do, are never fetched at the same time.
    other = next(n for n in range(1, 20) if remote._lock_of(f"{n}.arrow", 0) != remote._lock_of("0.arrow", 0))
    command = [sys.executable, "-c", CROSSED, url, str(tmp_path / "crossed"), str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, held, wanted], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for held, wanted in (("0", str(other)), (str(other), "0"))
    ]
    try:
        ended = [rank.communicate(timeout=PATIENCE) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [output for output, _ in ended] == ["100\n", "100\n"], ended


def test_threads_fetch_a_block_once(large_store, tmp_path):
    url, _ = large_store
    corpus = Corpus.open(url, cache=CacheSettings(tmp_path / "once", 64 * MIB))
    corpus._files.remote._system = slow = Slow(corpus._files.remote._system)
    sequence = corpus.sequence("train", "web")
    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(sequence.shard, 0) for _ in range(4)]:
            job.result(timeout=PATIENCE)
    assert slow.requests == 1


class Slow(Flaky):
    """A file system that takes its time, and counts what it is asked for."""

    requests = 0

    def __init__(self, system):
        super().__init__(system, 0)

    def cat_file(self, *arguments):
        self.requests += 1
        time.sleep(0.2)
        return self.system.cat_file(*arguments)


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_fills_the_cache_leaves_nothing_that_is_read(large_store, tmp_path):
    url, expected = large_store
    cache = CacheSettings(tmp_path / "killed", 64 * MIB)
    for seconds in (0.05, 0.1, 0.2):
        filling = multiprocessing.get_context("spawn").Process(target=_read_large, args=(url, cache, 1))
        filling.start()
        while not cached_files(cache):
            assert filling.is_alive()
            time.sleep(0.001)
        time.sleep(seconds)
        filling.kill()
        filling.join()
        assert _read_large(url, cache, 2) == expected
        for path in cached_files(cache)[::2]:
            path.unlink()


def test_what_the_cache_has_dropped_does_not_stay_open(large_store, tmp_path):
    url, _ = large_store
    corpus = Corpus.open(url, cache=CacheSettings(tmp_path / "small cache", 9 * MIB))
    sequence = corpus.sequence("train", "web")
    for begin in np.random.default_rng(0).permutation(np.arange(0, sequence.tokens - 1000, 50_000)).tolist():
        sequence.read(begin, np.empty(1000, dtype=np.uint16), np.zeros(1000, dtype=bool))
    held = {os.fstat(found.number).st_ino: os.fstat(found.number) for found in corpus._files._open.values()}
    assert len(held) > 4 and sum(status.st_blocks * 512 for status in held.values()) < 10 * MIB
