"""`verify` finds what checksums cannot: lists and manifests changed and signed again, strangers, repetitions."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.corpus.files import hash_file
from data_pipeline.corpus.inspection import verify_corpus
from data_pipeline.corpus.manifest import Manifest
from data_pipeline.corpus.shard_table import ShardTable
from data_pipeline.corpus.shards import ShardBuilder
from data_pipeline.corpus.token_sequence import shard_metadata


@pytest.fixture
def copy(corpus, tmp_path) -> Path:
    shutil.copytree(corpus.directory, tmp_path / "copy")
    return tmp_path / "copy"


def sign(folder: Path, **changes: object) -> None:
    dataclasses.replace(Manifest.read(folder), **changes).write(folder)


def sign_list(folder: Path, change) -> None:
    """Change the entries of inputs.jsonl and record its new checksum."""
    path = folder / "inputs.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    change(entries)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    sign(folder, inputs=dataclasses.replace(Manifest.read(folder).inputs, sha256=hash_file(path).sha256))


def lose_a_document(entries):
    entries[1]["documents"] -= 1


def lose_a_record(entries):
    entries[1]["documents"] -= 1
    entries[1]["records"] -= 1


def forget_a_file(entries):
    del entries[2]


def move_documents(entries):
    for key in ("records", "documents"):
        entries[0][key] += 5
        entries[1][key] -= 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose_a_document, "example_train_0.jsonl.zst: 30 records are not 29 documents + 0 rejected"),
        (lose_a_record, "6 files with {'records': 179, 'documents': 179}, the manifest says 6 with {'records': 180"),
        (forget_a_file, "5 files with {'records': 150, 'documents': 150}, the manifest says 6 with"),
        (move_documents, "unit 1: 25 documents read, 30 in its shards"),
    ],
)
def test_accounts_that_do_not_agree(copy, change, words):
    sign_list(copy, change)
    assert words in " ".join(verify_corpus(copy))


def signed_shards(folder: Path, change) -> None:
    entries = list(Manifest.read(folder).shards)
    change(entries)
    sign(folder, shards=ShardTable.from_entries(entries))


def twice(entries):
    entries.insert(3, entries[0])


def dropped(entries):
    del entries[4]


def text_bytes(entries):
    entries[0] = dataclasses.replace(entries[0], text_bytes=entries[0].text_bytes - 1)


def documents(entries):
    entries[0] = dataclasses.replace(entries[0], documents=entries[0].documents + 1)


def split_label(entries):
    entries[0] = dataclasses.replace(entries[0], split="validation")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (twice, "listed twice in the manifest"),
        (dropped, "not listed in the manifest; it belongs to another corpus, or remained of a kill"),
        (text_bytes, "bytes of text, the manifest says"),
        (documents, "tokens, the manifest says"),
        (split_label, "its split is 'test', the manifest says 'validation'"),
    ],
)
def test_shard_lists_that_were_signed_again(copy, change, words):
    name = Manifest.read(copy).shards[4 if change is dropped else 0].file
    signed_shards(copy, change)
    problems = [problem for problem in verify_corpus(copy) if words in problem]
    assert len(problems) == 1 and str(copy / name) in problems[0]


def test_a_shard_under_another_name_is_a_repetition(copy):
    first = Manifest.read(copy).shards[0]
    again = dataclasses.replace(first, file=first.file.replace("-000000.arrow", "-000009.arrow"))
    shutil.copy(copy / first.file, copy / again.file)
    assert "not listed in the manifest" in verify_corpus(copy)[0]
    signed_shards(copy, lambda entries: entries.append(again))
    assert f"{copy / again.file}: the same content as {first.file}" in verify_corpus(copy)


def with_shard(folder: Path, builder: ShardBuilder) -> list[str]:
    """The faults after the first shard was written anew by `builder` and everything signed again."""
    manifest = Manifest.read(folder)
    old = manifest.shards[0]
    entry = dataclasses.replace(old, documents=builder.documents, tokens=builder.tokens, text_bytes=builder.text_bytes)
    hashes = builder.write(folder / old.file, shard_metadata(entry, manifest.tokenizer.fingerprint))
    entry = dataclasses.replace(entry, **dataclasses.asdict(hashes))
    sign(folder, shards=ShardTable.from_entries([entry, *manifest.shards[1:]]))
    return [fault for fault in verify_corpus(folder) if str(folder / old.file) in fault]


def test_structure_is_checked_and_the_place_named(copy, corpus):
    eod = corpus.eod_id
    builder = ShardBuilder(corpus.vocab_size, eod)
    builder.add(np.array([5, 6]), b"ab")
    builder.add(np.array([5, eod, 6]), b"a b")
    assert with_shard(copy, builder)[0].endswith(
        f"document 1 holds the end-of-document id {eod} before its end, at token 4"
    )
    builder = ShardBuilder(corpus.vocab_size, eod + 1)
    builder.add(np.array([5, 6]), b"ab")
    assert with_shard(copy, builder)[0].endswith(f"document 0 does not end with the end-of-document id {eod}")
    builder = ShardBuilder(corpus.vocab_size + 10, eod)
    builder.add(np.array([5, corpus.vocab_size + 7]), b"ab")
    assert f"token 1: id {corpus.vocab_size + 7} is outside the vocabulary" in with_shard(copy, builder)[0]


def test_the_damaged_bytes_of_a_large_shard_are_named_by_many_threads(copy, corpus):
    builder = ShardBuilder(corpus.vocab_size, corpus.eod_id)
    builder.add(np.random.default_rng(0).integers(3, corpus.vocab_size, 3_000_000), b"text")
    assert len(with_shard(copy, builder)) == 0
    path = copy / Manifest.read(copy).shards[0].file
    data = bytearray(path.read_bytes())
    data[(4 << 20) + 5] ^= 1
    path.write_bytes(data)
    problem = verify_corpus(copy, threads=4)[-1]
    assert problem.startswith(f"{path}: altered: the 4 MiB block 1 (bytes 4194304 to {len(data) - 1})")
