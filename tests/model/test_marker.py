"""The marker of a checkpoint names files of its own folder, or is none; nothing in its place makes a reader wait."""

import json
import os
import shutil

import pytest

from model.marker import COMPLETE, LaterMarkerError, MarkerError, read_marker

FILE = {"bytes": 3, "xxh3_128": "0" * 32}


def write(folder, content):
    (folder / COMPLETE).write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_marker_gives_the_files_with_size_and_checksum(tmp_path):
    write(tmp_path, {"format_version": 1, "files": {"weights/a": FILE, "state.json": FILE}})
    assert read_marker(tmp_path).files == {"weights/a": FILE, "state.json": FILE}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read: Expecting value"),
        ("\0" * 100, "cannot be read: "),
        ("[" * 100_000, "cannot be read: "),
        ([], "it holds no JSON object"),
        ("null", "it holds no JSON object"),
        ({}, "has format_version None; this version of xlstm-pretrain reads 1"),
        ({"format_version": [], "files": {}}, "has format_version []; "),
        ({"format_version": 1}, "its 'files' do not give each file's size and checksum"),
        ({"format_version": 1, "files": []}, "its 'files' do not give"),
        ({"format_version": 1, "files": {"a": 3}}, "its 'files' do not give"),
        ({"format_version": 1, "files": {"a": {"bytes": "3", "xxh3_128": ""}}}, "its 'files' do not give"),
        ({"format_version": 1, "files": {"a": {"bytes": True, "xxh3_128": ""}}}, "its 'files' do not give"),
        ({"format_version": 1, "files": {"../x": FILE}}, "a key of files is '../x', a path with '..'; only regular"),
        ({"format_version": 1, "files": {"/etc/passwd": FILE}}, "is '/etc/passwd', an absolute path; "),
        ({"format_version": 1, "files": {"a\0": FILE}}, "is 'a\\x00', which no file is called; "),
        ({"format_version": 1, "files": {"link": FILE}}, "is 'link', a link out of its folder, to /etc/hostname; "),
        ({"format_version": 1, "files": {"pipe": FILE}}, "is 'pipe', which is a named pipe; "),
    ],
)
def test_what_is_no_marker_is_refused_with_its_path(tmp_path, content, words):
    (tmp_path / "link").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path, content)
    with pytest.raises(MarkerError) as error:
        read_marker(tmp_path)
    assert str(error.value).startswith(str(tmp_path / COMPLETE)) and words in str(error.value)
    assert not isinstance(error.value, LaterMarkerError)


def test_a_pipe_a_folder_or_nothing_in_its_place_is_refused_at_once(tmp_path):
    with pytest.raises(MarkerError, match="complete.json cannot be read: it is missing"):
        read_marker(tmp_path)
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / "marker")
        (tmp_path / COMPLETE).symlink_to("marker")
        with pytest.raises(MarkerError, match="complete.json cannot be read: it is no regular file"):
            read_marker(tmp_path)
        (tmp_path / COMPLETE).unlink()
        (tmp_path / "marker").unlink() if make is os.mkfifo else shutil.rmtree(tmp_path / "marker")


def test_a_later_version_is_told_from_damage(tmp_path):
    write(tmp_path, {"format_version": 9, "files": ["other"]})
    with pytest.raises(LaterMarkerError, match="has format_version 9; .* upgrade xlstm-pretrain"):
        read_marker(tmp_path)
