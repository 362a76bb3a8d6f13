"""Names in documents lead to regular files of their folder, or nowhere."""

import os
import re
import socket

import pytest

from conf.named_files import FOREIGN_NAME, unsafe_file


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "file").touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").touch()
    return folder


FOREIGN = {
    "/etc/passwd": "an absolute path",
    "//x": "an absolute path",
    "..": "a path with '..'",
    "../../.bashrc": "a path with '..'",
    "below/../file": "a path with '..'",
    "below/..": "a path with '..'",
    "below/\0": "which no file is called",
    "": "which no file is called",
    "below/\ud800": "which no file is called",
}


@pytest.mark.parametrize("name", FOREIGN, ids=repr)
def test_names_that_lead_elsewhere_are_refused_with_document_key_and_value(folder, name):
    for where in (None, folder):
        assert unsafe_file("a/manifest.json", "report.file", name, where) == (
            f"a/manifest.json: report.file is {name!r}, {FOREIGN[name]}; only regular files within "
            f"{where or 'its folder'} are read or written: restore what was altered, or do not use what came with it"
        )
    assert re.search(FOREIGN_NAME, name) or "\ud800" in name


@pytest.mark.parametrize("name", [None, 3, ["x"], {}])
def test_a_name_that_is_no_text_is_refused(folder, name):
    assert ", which is no text;" in unsafe_file("m", "file", name, folder)


@pytest.mark.parametrize(
    "name", ["below/file", "missing", "missing/too", "..x", "x..", "a/..b/...", "below/file/x", "x" * 300]
)
def test_names_of_the_folder_pass_whether_the_file_is_there_or_not(folder, name):
    assert unsafe_file("m", "file", name, folder) == "" == unsafe_file("m", "file", name)
    assert not re.search(FOREIGN_NAME, name)


def test_links_out_of_the_folder_are_refused_and_those_within_it_are_not(folder, tmp_path):
    (folder / "within").symlink_to("below/file")
    (folder / "out").symlink_to("../outside/file")
    (folder / "folder-out").symlink_to(tmp_path / "outside")
    (folder / "out-to-nothing").symlink_to(tmp_path / "outside" / "new")
    (folder / "beside").symlink_to(tmp_path / "folder-beside")
    (folder / "loop").symlink_to("loop")
    assert unsafe_file("m", "file", "within", folder) == ""
    for name, place in {
        "out": "outside/file",
        "folder-out/file": "outside/file",
        "folder-out/new": "outside/new",
        "out-to-nothing": "outside/new",
        "beside": "folder-beside",
    }.items():
        assert f"{name!r}, a link out of its folder, to {tmp_path / place};" in unsafe_file("m", "file", name, folder)
    allowed = []
    assert unsafe_file("m", "file", "out", folder, lambda path: allowed.append(path) is None) == ""
    assert allowed == [str(tmp_path / "outside" / "file")]
    assert unsafe_file("m", "file", "loop", folder) == ""
    # The folder itself may be a link: it was named by who runs the command.
    (tmp_path / "link").symlink_to(folder)
    assert unsafe_file("m", "file", "below/file", tmp_path / "link") == ""
    assert unsafe_file("m", "file", "within", tmp_path / "link") == ""
    assert "a link out of" in unsafe_file("m", "file", "out", tmp_path / "link")


def test_what_is_no_regular_file_is_refused(folder):
    os.mkfifo(folder / "pipe")
    (folder / "to-pipe").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(folder, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    kinds = {"pipe": "a named pipe", "to-pipe": "a named pipe", "socket": "a socket", "below": "a folder"}
    for name, kind in kinds.items():
        assert f"{name!r}, which is {kind};" in unsafe_file("m", "file", name, folder)
    assert ", which is a device;" in unsafe_file("m", "file", "null", "/dev")
