"""Work goes on without a reader of its output; commands whose output is the work end quietly."""

import io
import os
import subprocess
import sys

import pytest

from conf.command_line import exit_code
from conf.lasting_output import lasting_output
from tests.runs import ROOT, closed_pipe, environment


def test_what_nobody_reads_goes_to_the_file_and_is_reported_once(tmp_path):
    losses = []

    def report(*loss):
        losses.append(loss)

    with closed_pipe() as pipe, lasting_output() as output, output.spilling_to(tmp_path / "log", report):
        for number in range(3):
            print(f"line {number}", file=sys.stderr, flush=True)
        # As a library, or a child process, does that writes to the descriptor itself.
        os.write(sys.stderr.fileno(), b"from below\n")
        assert not sys.stderr.isatty() and sys.stderr is not pipe
    assert (tmp_path / "log").read_text() == "line 0\nline 1\nline 2\nfrom below\n"
    assert losses == [("stderr", "Broken pipe")]


def test_a_loss_before_there_is_a_file_is_reported_later(tmp_path):
    losses = []
    with closed_pipe(), lasting_output() as output:
        print("early", file=sys.stderr, flush=True)
        with output.spilling_to(tmp_path / "log", lambda *loss: losses.append(loss)):
            print("late", file=sys.stderr, flush=True)
    assert losses == [("stderr", "Broken pipe")]
    assert (tmp_path / "log").read_text() == "late\n"


def test_a_full_disk_behind_the_output_ends_nothing(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with lasting_output():
            print("x" * 100_000, flush=True)
            print("more", flush=True)


def test_a_slow_reader_is_not_lost(monkeypatch):
    class Slow(io.StringIO):
        def write(self, text):
            raise BlockingIOError

    monkeypatch.setattr(sys, "stderr", Slow())
    losses = []
    with lasting_output() as output, output.spilling_to(os.devnull, lambda *loss: losses.append(loss)):
        print("dropped", file=sys.stderr)
    assert losses == []


def test_text_that_the_stream_cannot_say_is_no_loss(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    with lasting_output(), pytest.raises(UnicodeEncodeError):
        print("é")


def test_a_command_whose_output_nobody_reads_ends_quietly_with_its_own_exit_code():
    def fail():
        raise OSError("no such thing")

    with closed_pipe():
        assert exit_code(fail, (OSError,), "interrupted") == 1
    with closed_pipe():
        assert exit_code(lambda: print("x", file=sys.stderr, flush=True) or 0, (OSError,), "interrupted") == 0


def test_a_command_without_any_output_stream_or_reader_leaves_nothing_to_fail_at_its_end():
    code = (
        "import os, sys; from conf.command_line import exit_code; r, w = os.pipe(); os.close(r); os.dup2(w, 1); "
        "os.dup2(w, 2); sys.exit(exit_code(lambda: print('seen') or 0, (OSError,), ''))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT).returncode == 0
    started_without = (
        "import sys\nfrom conf.command_line import exit_code\nfrom conf.lasting_output import lasting_output\n"
        "from train.__main__ import end_process\n"
        "with lasting_output():\n print('x', file=sys.stderr, flush=True)\n"
        " assert open('conf/train.yaml').fileno() > 2\n"
        "end_process(exit_code(lambda: 0, (), ''))"
    )
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", started_without]
    assert subprocess.run(shell, env=environment(), cwd=ROOT).returncode == 0
