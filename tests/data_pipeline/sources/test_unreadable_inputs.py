"""What lies in a folder and is no readable regular file is counted by name and reason, and never waited for."""

from __future__ import annotations

import gzip
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from data_pipeline.corpus.inspection import verify_corpus
from data_pipeline.errors import CorpusError, PrepareError
from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.reading.live import LiveCorpus, LiveStream
from data_pipeline.sources.config import DataConfig, SplitConfig, ToleranceConfig
from data_pipeline.sources.source import Rejection
from data_pipeline.sources.sources import open_source
from data_pipeline.tokenizing.config import TokenizerConfig
from tests.data_pipeline.commands import contents
from tests.data_pipeline.small_corpora import TOKENIZER, quietly, sample_texts

ALL_TRAIN = SplitConfig(validation_fraction=0)
LINE = json.dumps({"text": "some text"}) + "\n"
REASONS = {
    "fifo.txt": "no regular file but a named pipe (FIFO)",
    "link.txt": "cannot be opened (a link to gone: No such file or directory)",
    "self.txt": "cannot be opened (a link to self.txt: Too many levels of symbolic links)",
    "socket.txt": "no regular file but a socket",
    "zero.txt": "no regular file but a character device",
}


def write_special_files(folder: Path) -> None:
    (folder / "link.txt").symlink_to("gone")
    (folder / "self.txt").symlink_to("self.txt")
    (folder / "zero.txt").symlink_to("/dev/zero")
    os.mkfifo(folder / "fifo.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.txt"))


def text_config(folder: Path, **changes: object) -> DataConfig:
    settings = {"kind": "text", "files": ["**/*.txt"], "split": ALL_TRAIN}
    return DataConfig(path=str(folder), **{**settings, **changes})


def write_texts(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(sample_texts()):
        (folder / f"good{number}.txt").write_text(text, "utf-8")


def rejections(data: DataConfig) -> dict[str, tuple[str, str]]:
    source = open_source(data)
    found = [record for item in source.inputs() for record in source.read(item, lambda count: None)]
    return {r.file: (r.reason, r.detail) for r in found if isinstance(r, Rejection)}


@contextmanager
def folder_of_another_user() -> Iterator[Path]:
    """A folder of this user, who is not root meanwhile: root may read everything."""
    with tempfile.TemporaryDirectory() as name:
        was_root = os.geteuid() == 0
        if was_root:
            os.chown(name, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            for path in Path(name).rglob("*"):
                path.chmod(0o700)
            if was_root:
                os.seteuid(0)


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_what_is_no_regular_file_is_one_rejection_each_with_name_and_reason(tmp_path, kind):
    (tmp_path / "good.txt").write_text(LINE)
    write_special_files(tmp_path)
    reason = "unreadable_document" if kind == "text" else "unreadable_input"
    assert rejections(text_config(tmp_path, kind=kind)) == {name: (reason, REASONS[name]) for name in REASONS}


def test_special_files_of_a_text_tree_fall_under_its_tolerance(tmp_path):
    write_texts(tmp_path / "raw")
    data = text_config(tmp_path / "raw", tolerance=ToleranceConfig(rejected_fraction=0.2))
    settings = PrepareConfig(data, TOKENIZER, str(tmp_path / "clean"), unit_bytes=1)
    quietly(settings)
    write_special_files(tmp_path / "raw")
    manifest, _ = quietly(replace(settings, output=str(tmp_path / "out")))
    assert manifest.inputs.documents == 30 and manifest.inputs.rejected == {"unreadable_document": 5}
    assert verify_corpus(tmp_path / "out") == []
    report = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert {entry["file"]: entry["detail"] for entry in report} == REASONS
    with_two, _ = quietly(replace(settings, output=str(tmp_path / "two"), workers=2))
    assert contents(tmp_path / "two") == contents(tmp_path / "out") and with_two == manifest
    _, log = quietly(replace(settings, output=str(tmp_path / "out")))
    assert "already prepared" in log
    (tmp_path / "raw" / "gone").write_text("there again")
    with pytest.raises(PrepareError, match=r"link.txt: 0 bytes there, 11 now"):
        quietly(replace(settings, output=str(tmp_path / "out")))


def test_more_than_the_tolerance_allows_is_refused_before_anything_is_begun(tmp_path):
    write_texts(tmp_path / "raw")
    write_special_files(tmp_path / "raw")
    data = text_config(tmp_path / "raw", tolerance=ToleranceConfig(rejected_fraction=0.1))
    settings = PrepareConfig(data, TOKENIZER, str(tmp_path / "out"))
    message = r"5 of 35 records .*5 x unreadable_document(.|\n)*  fifo.txt: unreadable_document: no regular file but"
    with pytest.raises(PrepareError, match=message):
        quietly(settings)
    (tmp_path / "raw" / "link.txt").unlink()
    (tmp_path / "raw" / "fifo.txt").unlink()
    manifest, log = quietly(settings)
    assert "resuming" not in log and manifest.inputs.rejected == {"unreadable_document": 3}


def test_a_record_file_that_cannot_be_read_counts_as_a_damaged_file(tmp_path):
    (tmp_path / "raw").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in sample_texts())
    (tmp_path / "raw" / "a.jsonl").write_text(lines)
    (tmp_path / "raw" / "b.jsonl").symlink_to("/nowhere/b.jsonl")
    data = text_config(tmp_path / "raw", kind="jsonl", files=["*.jsonl"])
    settings = PrepareConfig(data, TOKENIZER, str(tmp_path / "out"))
    with pytest.raises(PrepareError, match="1 damaged files, data.tolerance.damaged_files allows 0") as error:
        quietly(settings)
    assert "b.jsonl: unreadable_input: cannot be opened (a link to /nowhere/b.jsonl: No such" in str(error.value)
    tolerant = replace(data, tolerance=ToleranceConfig(rejected_fraction=0.5, damaged_files=1))
    manifest, _ = quietly(replace(settings, data=tolerant))
    assert manifest.inputs.rejected == {"unreadable_input": 1} and manifest.inputs.documents == 30


def test_files_and_folders_without_permission_are_named():
    with folder_of_another_user() as folder:
        for name in ("good.txt", "secret.txt", "closed/a.txt", "unlisted/b.txt"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("text")
        (folder / "secret.txt").chmod(0)
        (folder / "closed").chmod(0o600)
        (folder / "unlisted").chmod(0)
        assert rejections(text_config(folder)) == {
            "closed/a.txt": ("unreadable_document", "cannot be opened (Permission denied)"),
            "secret.txt": ("unreadable_document", "may not be read by this user (Permission denied)"),
            "unlisted": ("unreadable_input", "a folder that cannot be listed (Permission denied)"),
        }
        with pytest.raises(PrepareError, match=r"unlisted: cannot be listed \(Permission denied\); set data.path"):
            open_source(text_config(folder / "unlisted")).inputs()


def test_a_folder_that_matches_counts_only_where_none_of_its_files_does(tmp_path):
    for name in ("a.txt/part.txt", "b.txt/part-0", "c.txt/.hidden", "plain/part-0"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("text")
    (tmp_path / "empty.txt").mkdir()
    detail = "a folder whose name matches data.files, but no file in it does"
    assert rejections(text_config(tmp_path, exclude=[".*"])) == {"b.txt": ("unreadable_input", detail)}
    assert rejections(text_config(tmp_path, files=["*"])) == {}


def test_a_path_that_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    settings = PrepareConfig(text_config(tmp_path / "pipe"), TOKENIZER, str(tmp_path / "out"))
    with pytest.raises(PrepareError, match="pipe: unreadable_document: no regular file but a named pipe"):
        quietly(settings)


def test_a_file_name_that_is_not_utf8_is_read(tmp_path):
    write_texts(tmp_path / "raw")
    Path(os.fsdecode(os.fsencode(tmp_path / "raw") + b"/caf\xe9.txt")).write_text("a text of its own")
    manifest, _ = quietly(PrepareConfig(text_config(tmp_path / "raw"), TOKENIZER, str(tmp_path / "out")))
    assert manifest.inputs.documents == 31 and verify_corpus(tmp_path / "out") == []


@pytest.mark.parametrize("padding", [1, 511, 200_000])
def test_zeros_after_a_gzip_member_are_padding(tmp_path, padding):
    member = gzip.compress((LINE * 3).encode())
    for data in (member + bytes(padding), member + bytes(padding) + member + bytes(padding)):
        (tmp_path / "a.jsonl.gz").write_bytes(data)
        expected = gzip.decompress(data).count(b"\n")
        source = open_source(text_config(tmp_path, kind="jsonl", files=["*"]))
        found = [r for item in source.inputs() for r in source.read(item, lambda count: None)]
        assert [getattr(r, "text", r) for r in found] == ["some text"] * expected


@pytest.mark.parametrize("name", ["zeros.jsonl.gz", "garbage.jsonl.gz", "cut.jsonl.gz", "zeros.jsonl.zst"])
def test_zeros_hide_no_damage(tmp_path, name):
    member = gzip.compress(LINE.encode())
    data = {
        "zeros.jsonl.gz": bytes(512),
        "garbage.jsonl.gz": member + bytes(512) + b"garbage",
        "cut.jsonl.gz": member + bytes(512) + member[:-3],
        # zstd has no padding; its own tool refuses it.
        "zeros.jsonl.zst": zstandard.compress(LINE.encode()) + bytes(512),
    }
    (tmp_path / name).write_bytes(data[name])
    assert rejections(text_config(tmp_path, kind="jsonl", files=["*"]))[name][0] == "damaged_archive"


def test_a_skippable_frame_of_zstd_holds_no_text(tmp_path):
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"1234"
    frame = zstandard.compress(LINE.encode())
    for data in (skippable + frame, frame + skippable, frame + skippable + frame):
        (tmp_path / "a.jsonl.zst").write_bytes(data)
        assert rejections(text_config(tmp_path, kind="jsonl", files=["*"])) == {}


def test_reading_live_counts_what_cannot_be_read(tmp_path, sentencepiece_file, caplog):
    write_texts(tmp_path / "raw")
    (tmp_path / "raw" / "gone.txt").symlink_to("nowhere")
    tokenizer = TokenizerConfig(kind="file", path=str(sentencepiece_file), eod_token="</s>")
    strict = text_config(tmp_path / "raw", tolerance=ToleranceConfig(rejected_fraction=0.01))
    with pytest.raises(CorpusError, match="gone.txt: unreadable_document: cannot be opened"):
        LiveStream(LiveCorpus(strict, tokenizer, "train"), 8, 0, 1, 1).batch(100_000, 1)
    caplog.set_level(logging.WARNING)
    lines = text_config(tmp_path / "raw", kind="jsonl", tolerance=ToleranceConfig(1, damaged_files=1))
    for number in range(30):
        (tmp_path / "raw" / f"good{number}.txt").write_text(LINE)
    with pytest.raises(CorpusError, match="max_epochs"):
        LiveStream(LiveCorpus(lines, tokenizer, "train"), 8, 0, 1, 1).batch(100_000, 1)
    assert "gone.txt: unreadable_input: cannot be opened" in caplog.text
