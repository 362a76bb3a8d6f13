"""The manifest stays small, its table of shards is mapped, and neither is read when it was altered."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys

import pytest

from data_pipeline.corpus.manifest import Manifest
from data_pipeline.corpus.shard_table import ShardEntry, ShardTable
from data_pipeline.errors import CorpusError
from tests.runs import PATIENCE, ROOT, environment


def entries(count: int) -> list[ShardEntry]:
    rng = random.Random(1)
    return [
        ShardEntry(
            file=f"shards/{n}.arrow",
            split=rng.choice(["train", "test"]),
            source=rng.choice(["b", "a", "é"]),
            unit=n // 3,
            documents=rng.randrange(1, 9),
            tokens=rng.randrange(10, 2**33),
            text_bytes=rng.randrange(2**34),
            bytes=rng.randrange(2**34),
            sha256=f"{rng.getrandbits(256):064x}",
            xxh3_128=f"{rng.getrandbits(128):032x}",
            xxh3_64_blocks=[f"{rng.getrandbits(64):016x}" for _ in range(n % 4)],
        )
        for n in range(count)
    ]


def test_rows_columns_and_sums_are_those_of_the_entries(tmp_path):
    expected = entries(50)
    table = ShardTable.from_entries(expected)
    table.write(tmp_path)
    for found in (table, ShardTable.read(tmp_path, table.entry)):
        assert list(found) == expected and found[-1] == expected[-1] and found[3:5] == expected[3:5]
        assert found.tokens.tolist() == [e.tokens for e in expected]
        assert found.block_hashes(7).hex() == "".join(expected[7].xxh3_64_blocks)
        for split in ("train", "test"):
            for source in ("a", "b", "é"):
                mine = [n for n, e in enumerate(expected) if (e.split, e.source) == (split, source)]
                assert found.rows(split, source).tolist() == mine
                assert found.sums()[split][source]["tokens"] == sum(expected[n].tokens for n in mine)
    with pytest.raises(IndexError, match="row 50 of 50 shards"):
        table[50]


def test_the_same_entries_give_the_same_bytes():
    assert ShardTable.from_entries(entries(20)) == ShardTable.from_entries(iter(entries(20)))
    assert ShardTable.from_entries(entries(20)) != ShardTable.from_entries(entries(19))


def test_a_manifest_does_not_grow_with_its_shards(corpus, tmp_path):
    manifest = Manifest.read(corpus.directory)
    sizes = []
    for count in (10, 3000):
        dataclasses.replace(manifest, shards=ShardTable.from_entries(entries(count))).write(tmp_path)
        sizes.append((tmp_path / "manifest.json").stat().st_size)
        assert len(Manifest.read(tmp_path).shards) == count
    assert sizes[1] < sizes[0] + 200


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_a_flipped_bit_in_the_table_of_shards_is_refused(corpus, tmp_path, place):
    shutil.copytree(corpus.directory, tmp_path / "copy")
    path = tmp_path / "copy" / "shards.arrow"
    data = bytearray(path.read_bytes())
    data[{"start": 9, "middle": len(data) // 2, "end": -1}[place]] ^= 2
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=r"shards\.arrow: altered after it was written"):
        Manifest.read(tmp_path / "copy")
    path.unlink()
    with pytest.raises(CorpusError, match=r"shards\.arrow: the table of shards is missing"):
        Manifest.read(tmp_path / "copy")


def test_a_table_of_another_corpus_is_refused(corpus, text_corpus, tmp_path):
    shutil.copytree(corpus.directory, tmp_path / "copy")
    shutil.copy(text_corpus.directory / "shards.arrow", tmp_path / "copy")
    with pytest.raises(CorpusError, match=r"shards\.arrow: altered"):
        Manifest.read(tmp_path / "copy")


def test_signed_sums_that_the_table_does_not_have_are_refused(corpus, tmp_path):
    from data_pipeline.corpus.manifest import fingerprint_of

    shutil.copytree(corpus.directory, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    document = json.loads(path.read_text())
    del document["fingerprint"]
    document["splits"]["train"]["RedPajamaC4"]["tokens"] += 1
    document["fingerprint"] = fingerprint_of(document)
    path.write_text(json.dumps(document))
    with pytest.raises(CorpusError, match=r"its sums are not those of shards\.arrow"):
        Manifest.read(tmp_path / "copy")


OPEN_LARGE = """
import json, sys, time, psutil, numpy as np
from pathlib import Path
from data_pipeline.corpus.manifest import Manifest
from data_pipeline.corpus.open_files import OpenFiles
from data_pipeline.corpus.token_sequence import TokenSequence
before = psutil.Process().memory_info().rss
started = time.process_time()
manifest = Manifest.read(Path(sys.argv[1]))
rows = manifest.shards.rows("train", "web")
files = OpenFiles(lambda row: Path(manifest.shards.file(row)), len(manifest.shards), limit=10)
sequence = TokenSequence(manifest, rows, files)
parts = list(sequence.parts(sequence.tokens - 5, sequence.tokens))
print(json.dumps({"seconds": time.process_time() - started, "bytes": psutil.Process().memory_info().rss - before,
                  "tokens": sequence.tokens, "number": parts[0][0]}))
"""


def test_a_hundred_thousand_shards_open_at_once_in_little_memory(corpus, tmp_path):
    """A tenth of the 10^6 shards of benchmarks/data_stream.py: below 2 s of CPU time and 100 MB beyond the imports."""
    (entry,) = entries(1)
    count = 100_000
    large = [dataclasses.replace(entry, split="train", source="web", tokens=627_000, documents=600)] * count
    manifest = dataclasses.replace(Manifest.read(corpus.directory), shards=ShardTable.from_entries(large))
    manifest.write(tmp_path)
    command = [sys.executable, "-c", OPEN_LARGE, str(tmp_path)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["tokens"], found["number"]) == (627_000 * count, count - 1)
    assert found["seconds"] < 2 and found["bytes"] < 100 * 2**20, found
