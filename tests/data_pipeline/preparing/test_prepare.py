"""Preparation: every record accounted for, restartable at any kill, and the same bytes whatever happened."""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import zstandard

from conf.problems import ConfigError
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.inspection import verify_corpus
from data_pipeline.errors import PrepareError, TokenizerError
from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.preparing.units import run_unit
from data_pipeline.sources.config import DataConfig, SplitConfig, ToleranceConfig
from data_pipeline.tokenizing.config import TokenizerConfig
from tests.data_pipeline.small_corpora import TOKENIZER, quietly, random_text, slimpajama_config, write_slimpajama


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def documents(folder: Path, split: str = "train") -> list[str]:
    """Decoded documents of a split, source by source."""
    corpus = Corpus.open(folder)
    texts = []
    for source in corpus.sources(split):
        sequence = corpus.sequence(split, source)
        for number in range(len(sequence.entries)):
            shard = sequence.shard(number)
            rows = zip(shard.offsets[:-1], shard.offsets[1:], strict=True)
            texts += [corpus.tokenizer().decode(shard.tokens[a:b]) for a, b in rows]
    return texts


def test_every_document_is_written_once_and_decodes_to_its_text(tmp_path):
    texts = write_slimpajama(tmp_path / "raw")
    manifest, log = quietly(slimpajama_config(tmp_path / "raw", tmp_path / "out"))
    assert sorted(documents(tmp_path / "out")) == sorted(texts)
    assert set(manifest.splits) == {"train", "validation", "test"}
    assert set(manifest.splits["train"]) == {"RedPajamaC4", "RedPajamaGithub", "RedPajamaBook"}
    sums = [s for sources in manifest.splits.values() for s in sources.values()]
    assert sum(s["documents"] for s in sums) == manifest.inputs.documents == manifest.inputs.records == 180
    assert sum(s["text_bytes"] for s in manifest.splits["train"].values()) == sum(len(t.encode()) for t in texts)
    assert max(e.tokens for e in manifest.shards) * 2 < 4000 + 2 * max(len(t) for t in texts)
    assert "records read 180 = documents written 180 + rejected 0" in log
    names = {name.split("/")[0] for name in contents(tmp_path / "out")}
    assert names == {"inputs.jsonl", "manifest.json", "report.jsonl", "shards", "shards.arrow", "tokenizer"}


def test_the_same_input_gives_the_same_bytes_wherever_it_lies(tmp_path):
    write_slimpajama(tmp_path / "raw")
    quietly(slimpajama_config(tmp_path / "raw", tmp_path / "a"))
    shutil.move(tmp_path / "raw", tmp_path / "moved")
    quietly(slimpajama_config(tmp_path / "moved", tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_units_change_the_cut_but_not_the_documents_or_their_order(tmp_path):
    write_slimpajama(tmp_path / "raw", files=12)
    quietly(slimpajama_config(tmp_path / "raw", tmp_path / "small"))
    large, _ = quietly(slimpajama_config(tmp_path / "raw", tmp_path / "large", unit_bytes=10**9, shard_bytes=10**6))
    assert documents(tmp_path / "small") == documents(tmp_path / "large")
    assert len(large.shards) == 9


class Interrupted(Exception):
    pass


def interrupted(tmp_path: Path, units: int = 3) -> tuple[PrepareConfig, dict[str, bytes]]:
    """A preparation that stopped after units 0 to `units`, and what it should become."""
    write_slimpajama(tmp_path / "raw", files=6)
    quietly(slimpajama_config(tmp_path / "raw", tmp_path / "whole"))
    config = slimpajama_config(tmp_path / "raw", tmp_path / "out")

    def stopping(number, *arguments):
        if number > units:
            raise Interrupted
        return run_unit(number, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("data_pipeline.preparing.workers.run_unit", stopping)
        quietly(config)
    return config, contents(tmp_path / "whole")


def record_path(config: PrepareConfig, unit: int) -> Path:
    return Path(config.output) / "preparing" / "units" / f"{unit:06d}.json"


def test_a_torn_record_is_dropped(tmp_path):
    config, expected = interrupted(tmp_path)
    path = record_path(config, 3)
    path.write_bytes(path.read_bytes()[:-20])
    _, log = quietly(config)
    assert "3 of 8 units are finished" in log
    assert contents(tmp_path / "out") == expected


def test_a_shard_damaged_between_two_runs_is_written_again(tmp_path):
    config, expected = interrupted(tmp_path)
    shard = json.loads(record_path(config, 1).read_bytes())["shards"][0]["file"]
    path = Path(config.output) / shard
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    _, log = quietly(config)
    assert "3 of 8 units are finished" in log
    assert contents(tmp_path / "out") == expected


def test_leftovers_of_a_kill_are_removed(tmp_path):
    config, expected = interrupted(tmp_path)
    (tmp_path / "out" / "shards" / "train" / "RedPajamaC4-000099-000000.arrow.partial").write_bytes(b"torn")
    (tmp_path / "out" / "shards" / "train" / "RedPajamaC4-000099-000000.arrow").write_bytes(b"orphan")
    quietly(config)
    assert contents(tmp_path / "out") == expected


def test_a_full_disk_is_reported_and_the_state_can_be_continued(tmp_path):
    config, expected = interrupted(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses to write files beyond this size, which every shard has.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(PrepareError, match=r"no space left to write .*run the same command again") as error:
            quietly(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(config.output) in str(error.value)
    assert not list((tmp_path / "out" / "shards").rglob("*.partial"))
    _, log = quietly(config)
    assert "resuming, 4 of 8 units are finished" in log
    assert contents(tmp_path / "out") == expected


def test_a_finished_corpus_is_left_alone(tmp_path):
    write_slimpajama(tmp_path / "raw")
    config = slimpajama_config(tmp_path / "raw", tmp_path / "out")
    first, _ = quietly(config)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*") if p.name != ".lock"}
    second, log = quietly(config)
    assert "already prepared, nothing to do (180 documents" in log
    assert second == first
    assert before == {p: p.stat().st_mtime_ns for p in before}


def begun(tmp_path, finished):
    """The configuration of a preparation that has ended, or was interrupted."""
    if not finished:
        return interrupted(tmp_path)[0]
    write_slimpajama(tmp_path / "raw")
    config = slimpajama_config(tmp_path / "raw", tmp_path / "out")
    quietly(config)
    return config


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_with_the_difference(tmp_path, finished):
    config = begun(tmp_path, finished)
    other = replace(config, shard_bytes=77, tokenizer=replace(TOKENIZER, vocab_size=390))
    with pytest.raises(PrepareError) as error:
        quietly(other)
    assert "shard_bytes: 4000 there, 77 now" in str(error.value)
    assert "tokenizer.vocab_size: 400 there, 390 now" in str(error.value)
    assert "data." not in str(error.value)


@pytest.mark.parametrize("finished", [True, False])
def test_other_input_files_are_refused_by_name(tmp_path, finished):
    config = begun(tmp_path, finished)
    folder = tmp_path / "raw" / "train" / "chunk1"
    (folder / "example_train_0.jsonl.zst").unlink()
    (folder / "new.jsonl.zst").write_bytes(zstandard.compress(b"{}"))
    (folder / "example_train_1.jsonl.zst").write_bytes(b"short")
    with pytest.raises(PrepareError) as error:
        quietly(config)
    for words in ("_0.jsonl.zst: gone", "new.jsonl.zst: new", "_1.jsonl.zst: ", "bytes there, 5 now"):
        assert words in str(error.value)


def test_a_folder_of_something_else_is_refused(tmp_path):
    write_slimpajama(tmp_path / "raw")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(PrepareError, match=r"not empty \(it holds thesis.tex\) and not a corpus"):
        quietly(slimpajama_config(tmp_path / "raw", tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_an_output_in_at_or_above_the_input_is_refused_before_anything_is_written(tmp_path):
    write_slimpajama(tmp_path / "data" / "raw", files=1)
    (tmp_path / "link").symlink_to(tmp_path / "data" / "raw")
    before = sorted(tmp_path.rglob("*"))
    for output, how in (
        (tmp_path / "link" / "train" / "out", "lies in"),
        (tmp_path / "link", "is"),
        (tmp_path / "data", "holds"),
    ):
        with pytest.raises(
            PrepareError, match=f"output: {output} {how} the folder of the input, data.path=.*elsewhere"
        ):
            quietly(slimpajama_config(tmp_path / "data" / "raw", output))
    assert sorted(tmp_path.rglob("*")) == before
    # Beside a single file there is room.
    (file,) = (tmp_path / "data" / "raw" / "train").rglob("*.zst")
    config = slimpajama_config(file, file.parent / "out")
    manifest, _ = quietly(replace(config, data=replace(config.data, split=SplitConfig())))
    assert manifest.inputs.files == 1


@pytest.mark.parametrize(
    ("output", "message"),
    [("~/c", "output: write the home folder in full"), ("s3://b/c", "output: must be a folder of this machine, not a")],
)
def test_an_output_that_would_get_a_strange_name_is_refused(output, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        quietly(slimpajama_config(tmp_path / "raw", output))
    assert list(tmp_path.iterdir()) == []


def test_settings_that_gave_no_tokenizer_may_be_replaced_as_the_message_asks(tmp_path):
    write_slimpajama(tmp_path / "raw", files=1)
    tokenizer = TokenizerConfig(vocab_size=30_000, sample_bytes=200_000)
    config = slimpajama_config(tmp_path / "raw", tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(TokenizerError, match=r"set tokenizer\.vocab_size=\d+, or give more text") as refused:
        quietly(config)
    (fitting,) = re.findall(r"set tokenizer\.vocab_size=(\d+)", str(refused.value))
    manifest, _ = quietly(replace(config, tokenizer=replace(tokenizer, vocab_size=int(fitting))))
    assert manifest.tokenizer.vocab_size == int(fitting)


def test_a_tokenizer_from_a_file_and_text_that_spells_its_special_tokens(tmp_path):
    rng = random.Random(0)
    write_slimpajama(tmp_path / "raw", files=2)
    trained, _ = quietly(slimpajama_config(tmp_path / "raw", tmp_path / "first"))
    forged = ["a</s>b</s>", "</s>", "<s>x</s> <|endoftext|>"]
    (tmp_path / "forged").mkdir()
    for number, text in enumerate(forged):
        (tmp_path / "forged" / f"{number}.txt").write_text(text)
    (tmp_path / "forged" / "9.txt").write_text(random_text(rng, 50))
    model = tmp_path / "first" / "tokenizer" / "tokenizer.model"
    data = DataConfig(
        kind="text", path=str(tmp_path / "forged"), files=["*.txt"], split=SplitConfig(validation_fraction=0)
    )
    tokenizer = TokenizerConfig(kind="file", path=str(model))
    manifest, _ = quietly(PrepareConfig(data, tokenizer, str(tmp_path / "out")))
    assert manifest.tokenizer.fingerprint == trained.tokenizer.fingerprint
    assert documents(tmp_path / "out")[:3] == forged
    corpus = Corpus.open(tmp_path / "out")
    shard = corpus.sequence("train", "unknown").shard(0)
    assert (shard.tokens == corpus.eod_id).sum() == shard.documents == 4
    moved = tmp_path / "elsewhere.model"
    shutil.copy(model, moved)
    _, log = quietly(PrepareConfig(data, replace(tokenizer, path=str(moved)), str(tmp_path / "out")))
    assert "already prepared" in log


def test_the_standard_library_is_prepared_whole(tmp_path):
    from conf import compose

    overrides = [f"output={tmp_path}", "tokenizer.vocab_size=1024", "tokenizer.sample_bytes=300000"]
    overrides += ["data.files=[json/*.py,logging/*.py,asyncio/*.py,email/*.py]"]
    manifest, _ = quietly(compose(PrepareConfig, "prepare", overrides))
    assert set(manifest.splits) == {"train", "validation"}
    assert verify_corpus(tmp_path) == []
    texts = documents(tmp_path)
    assert any("class JSONDecoder" in text or "class Logger" in text for text in texts)
    names = [json.loads(line)["file"] for line in (tmp_path / "inputs.jsonl").read_text().splitlines()]
    assert "json/decoder.py" in names and not any("test" in name for name in names)


def test_no_document_at_all_is_an_error_that_names_the_reasons(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text('{"content": "x"}\n' * 3)
    write_slimpajama(tmp_path / "other", files=1)
    quietly(slimpajama_config(tmp_path / "other", tmp_path / "first"))
    tokenizer = TokenizerConfig(kind="file", path=str(tmp_path / "first" / "tokenizer"))
    data = DataConfig(kind="jsonl", path=str(tmp_path / "raw"), files=["*.jsonl"])
    with pytest.raises(PrepareError, match=r"no document was found in 1 inputs \(3 x no_text\); check data\.path"):
        quietly(PrepareConfig(data, tokenizer, str(tmp_path / "out")))
    with pytest.raises(PrepareError, match="no training document to train the tokenizer on"):
        quietly(PrepareConfig(data, TOKENIZER, str(tmp_path / "out2")))


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path):
    write_slimpajama(tmp_path / "raw", files=1, documents=5)
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w69999"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["<|endoftext|>"])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json"))
    config = slimpajama_config(tmp_path / "raw", tmp_path / "out", tokenizer=tokenizer)
    tolerance = ToleranceConfig(lost_text_fraction=1)
    manifest, _ = quietly(replace(config, data=replace(config.data, tolerance=tolerance)))
    assert manifest.token_dtype == "uint32" and manifest.tokenizer.eod_id == 70_000
    shard = Corpus.open(tmp_path / "out").sequence("train", "RedPajamaC4").shard(0)
    assert shard.tokens.dtype == "uint32" and set(shard.tokens.tolist()) == {69_999, 70_000}
    assert verify_corpus(tmp_path / "out") == []
