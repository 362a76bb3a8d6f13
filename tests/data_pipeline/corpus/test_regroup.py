"""Corpora are put together and taken apart without rewriting a shard, and stay what `verify` expects."""

from __future__ import annotations

import resource
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.__main__ import main
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.inspection import verify_corpus
from data_pipeline.corpus.manifest import Manifest
from data_pipeline.corpus.regroup import merge_corpora, split_corpus
from data_pipeline.errors import CorpusError, MachineError
from data_pipeline.tokenizing.config import TokenizerConfig
from tests.data_pipeline.small_corpora import TOKENIZER, quietly, slimpajama_config, write_slimpajama


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, Path]:
    """Two corpora of one tokenizer."""
    folder = tmp_path_factory.mktemp("two")
    for number in range(2):
        write_slimpajama(folder / f"raw{number}", seed=number)
    quietly(slimpajama_config(folder / "raw0", folder / "a"))
    tokenizer = TokenizerConfig(kind="file", path=str(folder / "a" / "tokenizer"))
    quietly(slimpajama_config(folder / "raw1", folder / "b", tokenizer=tokenizer))
    return folder / "a", folder / "b"


def shards(folder: Path) -> Counter:
    return Counter((e.split, e.source, e.tokens, e.sha256) for e in Manifest.read(folder).shards)


def test_merged_corpora_have_all_shards_and_no_copy(two, tmp_path):
    manifest = merge_corpora(list(two), tmp_path / "both")
    assert shards(tmp_path / "both") == shards(two[0]) + shards(two[1])
    assert verify_corpus(tmp_path / "both") == []
    corpus = Corpus.open(tmp_path / "both", check="hash")
    assert corpus.tokens("train") == sum(Corpus.open(folder).tokens("train") for folder in two)
    assert corpus.fingerprint == manifest.fingerprint not in [Corpus.open(folder).fingerprint for folder in two]
    assert manifest.inputs.documents == 360 and len(manifest.settings["merged"]) == 2
    for entry in manifest.shards:
        assert (tmp_path / "both" / entry.file).stat().st_nlink > 1
    assert all(verify_corpus(folder) == [] for folder in two)


def test_parts_of_a_corpus_and_the_whole_of_them_again(two, tmp_path):
    whole = two[0]
    _, books = split_corpus(whole, tmp_path / "books", splits=["train"], sources=["RedPajamaBook"])[0]
    assert {(e.split, e.source) for e in books.shards} == {("train", "RedPajamaBook")}
    assert verify_corpus(tmp_path / "books") == []
    parts = split_corpus(whole, tmp_path / "part", parts=3, link="copy")
    assert [folder.name for folder, _ in parts] == ["part-00000", "part-00001", "part-00002"]
    assert max(len(m.shards) for _, m in parts) - min(len(m.shards) for _, m in parts) <= 9
    for folder, manifest in parts:
        assert verify_corpus(folder) == []
        assert set(manifest.splits["train"]) == {"RedPajamaBook", "RedPajamaC4", "RedPajamaGithub"}
    again = merge_corpora([folder for folder, _ in parts], tmp_path / "again", link="symbolic")
    assert shards(tmp_path / "again") == shards(whole)
    assert verify_corpus(tmp_path / "again") == []
    assert again.inputs == Manifest.read(whole).inputs
    sources = ("RedPajamaBook", "RedPajamaC4")
    for source in sources:
        split_corpus(whole, tmp_path / source, sources=[source])
        split_corpus(tmp_path / source, tmp_path / f"{source}-train", splits=["train"])
    parts_of_parts = merge_corpora([tmp_path / f"{source}-train" for source in sources], tmp_path / "both")
    assert parts_of_parts.inputs == Manifest.read(whole).inputs


def test_what_cannot_be_merged_is_said(two, tmp_path):
    write_slimpajama(tmp_path / "raw", seed=5)
    config = slimpajama_config(tmp_path / "raw", tmp_path / "other", tokenizer=replace(TOKENIZER, vocab_size=390))
    quietly(config)
    with pytest.raises(CorpusError) as error:
        merge_corpora([two[0], tmp_path / "other"], tmp_path / "out")
    tokenizer = f"tokenizer=file tokenizer.path={two[0] / 'tokenizer' / 'tokenizer.model'}"
    assert f"{tmp_path / 'other'}: prepared with another tokenizer than {two[0]}; " in str(error.value)
    assert tokenizer in str(error.value) and "fingerprint" not in str(error.value)
    assert str(error.value).count("prepared with another tokenizer") == 1
    assert "its vocab_size is 390, " in str(error.value) and " has 400" in str(error.value)
    with pytest.raises(CorpusError, match=r"the same shard as .*/a/shards"):
        merge_corpora([two[0], two[1], two[0]], tmp_path / "out")
    with pytest.raises(CorpusError, match="exists already and is not an empty folder"):
        merge_corpora(list(two), tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_split_is_said(two, tmp_path):
    with pytest.raises(CorpusError, match=r"no source 'RedPajamaX'; the corpus has RedPajamaBook, RedPajamaC4"):
        split_corpus(two[0], tmp_path / "out", sources=["RedPajamaX"])
    with pytest.raises(CorpusError, match="no split 'dev'; the corpus has test, train, validation"):
        split_corpus(two[0], tmp_path / "out", splits=["dev"])
    with pytest.raises(CorpusError, match="shards of what is asked for do not give 500 parts"):
        split_corpus(two[0], tmp_path / "out", parts=500)


def test_a_folder_that_cannot_be_written_is_said_and_leaves_nothing(two, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["merge", *map(str, two), "--output", str(tmp_path / "file" / "out")]) == 1
    assert f"{tmp_path}/file/out: cannot be written (Not a directory)" in capsys.readouterr().err
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(MachineError, match=r"/out: cannot be written \(File too large\)"):
            split_corpus(two[0], tmp_path / "out", link="copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_hard_links_to_another_file_system_are_refused_with_what_to_do(two):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == two[0].stat().st_dev:
        pytest.skip("needs two file systems")
    with tempfile.TemporaryDirectory(dir=other) as folder:
        with pytest.raises(CorpusError, match=r"cannot get a second name in .*; use --link symbolic or --link copy"):
            split_corpus(two[0], Path(folder) / "out")
        assert not list(Path(folder).iterdir())
        split_corpus(two[0], Path(folder) / "out", link="symbolic")
        assert verify_corpus(Path(folder) / "out") == []


def test_the_commands(two, tmp_path, capsys):
    a, b = map(str, two)
    assert main(["merge", a, b, "--output", str(tmp_path / "both")]) == 0
    assert "shards of 2 corpora" in capsys.readouterr().out
    out = str(tmp_path / "part")
    assert main(["split", str(tmp_path / "both"), "--output", out, "--source", "RedPajamaC4", "--parts", "2"]) == 0
    assert f"{out}-00001: " in capsys.readouterr().out
    assert main(["verify", f"{out}-00001", "--workers", "2"]) == 0
    assert main(["inspect", f"{out}-00001"]) == 0
    for arguments, code, words in (
        (["merge", a, "--output", out], 2, "needs at least two corpora"),
        (["split", a, "--output", out, "--parts", "0"], 2, "--parts: must be at least 1 (0)"),
        (["verify", a, "--workers", "0"], 2, "--workers: must be at least 1 (0)"),
        (["merge", a, "/nowhere", "--output", out], 2, "/nowhere: no such folder"),
    ):
        assert main(arguments) == code
        assert words in capsys.readouterr().err


def test_an_output_inside_a_corpus_is_refused(two):
    inside = two[0] / "merged"
    with pytest.raises(CorpusError, match=f"{inside}: lies in the corpus {two[0]}; choose an output elsewhere"):
        merge_corpora(list(two), inside)
    with pytest.raises(CorpusError, match="lies in the corpus"):
        split_corpus(two[0], inside, splits=["train"])
    assert verify_corpus(two[0]) == [] and not inside.exists()


def test_a_home_folder_that_the_shell_left_as_it_was_is_expanded(two, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["split", str(two[0]), "--output=~/train", "--split=train"]) == 0
    assert Corpus.open(tmp_path / "train").splits == ["train"]
