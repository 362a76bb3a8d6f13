"""A corpus from elsewhere names files: none that is not its own is read, linked to or written."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline.__main__ import main
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.manifest import MANIFEST_FILE, Manifest, canonical_json, fingerprint_of
from data_pipeline.corpus.regroup import merge_corpora, split_corpus
from data_pipeline.corpus.remote import CacheSettings
from data_pipeline.corpus.shard_table import ShardTable
from data_pipeline.errors import CorpusError
from data_pipeline.ordering.packing import open_packing_plan
from data_pipeline.preparing.units import UnitRecord


@pytest.fixture
def copy(corpus, tmp_path) -> Path:
    return shutil.copytree(corpus.directory, tmp_path / "theirs" / "copy")


def rename(folder: Path, part: str, name: str) -> None:
    """Have a part of the manifest name another file, and sign it again."""
    manifest = Manifest.read(folder)
    if part == "shards":
        entries = list(manifest.shards)
        replace(manifest, shards=ShardTable.from_entries([replace(entries[0], file=name), *entries[1:]])).write(folder)
        return
    document = json.loads((folder / MANIFEST_FILE).read_text())
    del document["fingerprint"]
    document["shards" if part == "table" else part]["file"] = name
    document["fingerprint"] = fingerprint_of(document)
    (folder / MANIFEST_FILE).write_text(json.dumps(document))


PARTS = {
    "tokenizer": "manifest.json: tokenizer.file is ",
    "inputs": "manifest.json: inputs.file is ",
    "report": "manifest.json: report.file is ",
    "table": "manifest.json: shards.file is ",
    "shards": "shards.arrow: file of row 0 is ",
}


@pytest.mark.parametrize("name", ["../../.bashrc", "/etc/hostname", "a/../../b", "a\0b"])
@pytest.mark.parametrize("part", PARTS)
def test_names_that_lead_out_of_a_corpus_are_refused_when_it_is_read(copy, tmp_path, part, name):
    rename(copy, part, name)
    before = sorted(tmp_path.rglob("*"))
    cache = CacheSettings(tmp_path / "cache", 64 * 2**20)
    for read in (
        lambda: Manifest.read(copy),
        lambda: Corpus.open(copy),
        lambda: Corpus.open(copy, check="none"),
        lambda: split_corpus(copy, tmp_path / "deep" / "out"),
        lambda: merge_corpora([copy], tmp_path / "out"),
        lambda: Corpus.open(f"file://{copy}", cache=cache),
    ):
        with pytest.raises(CorpusError) as error:
            read()
        assert f"{PARTS[part]}{name!r}, " in str(error.value)
    shutil.rmtree(cache.directory)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_that_wrote_outside_of_its_output_writes_nothing(copy, tmp_path, capsys):
    victim = tmp_path / "home" / ".bashrc"
    victim.parent.mkdir()
    victim.write_text("mine")
    rename(copy, "report", "../../.bashrc")
    # So that there was something to copy.
    shutil.copy(copy / "report.jsonl", tmp_path / ".bashrc")
    output = victim.parent / "corpora" / "out"
    assert main(["split", str(copy), "--output", str(output)]) == 2
    assert "report.file is '../../.bashrc', a path with '..'" in capsys.readouterr().err
    assert victim.read_text() == "mine" and not output.parent.exists()
    assert main(["verify", str(copy)]) == 2


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("tokenizer", "folder-link"),
        *((p, k) for p in ("tokenizer", "inputs", "report", "table") for k in ("link", "pipe")),
    ],
)
def test_links_out_of_a_corpus_and_pipes_in_it_are_refused(copy, tmp_path, part, kind):
    document = json.loads((copy / MANIFEST_FILE).read_text())
    name = document["shards" if part == "table" else part]["file"]
    path = copy / name
    shutil.copytree(copy, tmp_path / "elsewhere")
    path.unlink()
    if kind == "folder-link":
        shutil.rmtree(path.parent)
        path.parent.symlink_to(tmp_path / "elsewhere" / path.parent.name)
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere" / name)
    else:
        os.mkfifo(path)
    why = "which is a named pipe" if kind == "pipe" else f"a link out of its folder, to {tmp_path / 'elsewhere' / name}"
    with pytest.raises(CorpusError) as error:
        Corpus.open(copy)
    assert f".file is {name!r}, {why}" in str(error.value)


@pytest.mark.parametrize("check", ["none", "size", "hash"])
@pytest.mark.parametrize("kind", ["link", "folder-link", "pipe"])
def test_shards_are_files_of_the_corpus_or_of_another_one(copy, tmp_path, kind, check):
    entry = Manifest.read(copy).shards[0]
    path = copy / entry.file
    outside = tmp_path / "outside"
    if kind == "folder-link":
        shutil.move(copy / "shards", outside)
        (copy / "shards").symlink_to(outside)
    else:
        shutil.move(path, outside)
        path.symlink_to(outside) if kind == "link" else os.mkfifo(path)
    with pytest.raises(CorpusError) as error:
        corpus = Corpus.open(copy, check=check)
        for number in range(len(corpus.manifest.shards)):
            corpus.sequence(corpus.manifest.shards[number].split, corpus.manifest.shards[number].source).shard(0)
    why = "which is a named pipe" if kind == "pipe" else f"a link out of its folder, to {outside}"
    assert f"{copy / 'shards.arrow'}: file is '{entry.file}', {why}" in str(error.value)


def test_a_split_by_symbolic_links_is_still_read(corpus, tmp_path):
    folder = Path(corpus.directory)
    split_corpus(folder, tmp_path / "linked", link="symbolic")
    split_corpus(tmp_path / "linked", tmp_path / "again", link="symbolic")
    for linked in ("linked", "again"):
        assert all((tmp_path / linked / entry.file).is_symlink() for entry in Manifest.read(tmp_path / linked).shards)
        assert Corpus.open(tmp_path / linked, check="hash").tokens("train") == corpus.tokens("train")


@pytest.mark.parametrize("name", ["../000.samples", "/etc/hostname"])
def test_a_packing_plan_names_its_own_files(copy, name):
    corpus = Corpus.open(copy)
    folder = open_packing_plan(corpus, "train", 32).folder
    plan = json.loads((folder / "plan.json").read_bytes())
    source = sorted(plan["sources"])[0]
    plan["sources"][source]["samples"]["file"] = name
    del plan["fingerprint"]
    plan["fingerprint"] = fingerprint_of(plan)
    (folder / "plan.json").write_text(canonical_json(plan))
    with pytest.raises(CorpusError) as error:
        open_packing_plan(corpus, "train", 32)
    assert f"{folder / 'plan.json'}: sources.{source}.samples.file is {name!r}, " in str(error.value)


def test_a_record_of_a_preparation_that_names_a_foreign_shard_is_none(corpus, tmp_path):
    entry = corpus.manifest.shards[0]
    line = {"file": "a.txt", "bytes": 1, "unit": 0, "rejected": {}, "repaired": {}}
    line |= {"records": entry.documents, "documents": entry.documents}
    for name, is_sound in ((entry.file, True), ("../x.arrow", False)):
        UnitRecord(0, "reference", [replace(entry, file=name)], [line], []).write(tmp_path / "000000.json")
        assert (UnitRecord.read(tmp_path / "000000.json") is not None) is is_sound


class Listing(MemoryFileSystem):
    """A store that lists what it likes: object stores take any name of an object."""

    protocol = "listing"

    def ls(self, path, detail=True, **settings):
        return [f"{path}/.."]


def test_names_that_a_store_lists_are_no_way_out_of_the_cache(corpus, tmp_path):
    fsspec.register_implementation("listing", Listing, clobber=True)
    # The same objects.
    system = fsspec.filesystem("memory")
    _, root = fsspec.url_to_fs("listing://listed")
    system.put(str(corpus.directory), root, recursive=True)
    try:
        with pytest.raises(CorpusError) as error:
            Corpus.open("listing://listed", cache=CacheSettings(tmp_path / "cache", 64 * 2**20))
    finally:
        system.rm(root, recursive=True)
    assert "listing://listed: its list of tokenizer/ is 'tokenizer/..', a path with '..'; " in str(error.value)
