"""events.jsonl stays readable, and loses nothing that was whole, wherever a kill tore its last line."""

import fcntl
import json
import threading

import pytest

from conf import ConfigError, compose
from tests.runs import PATIENCE, run_train
from train import context
from train.config import RunConfig
from train.run_directory import EventLog, read_events


def event_names(run_directory):
    return [event["event"] for event in read_events(run_directory)]


def test_an_event_after_a_torn_line_stands_on_its_own(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path, is_main=True)
    log.append("start", world_size=2, steps=10)
    log.append("error", message="line\nend, \u2028, \u00e9")
    written = path.read_bytes()
    header, *events = written.splitlines(keepends=True)
    for length in range(len(written) + 1):
        path.write_bytes(written[:length])
        log.append("complete", step=10, reason=None)
        found = path.read_bytes().splitlines(keepends=True)
        lines = [json.loads(line) for line in found]
        assert [line["event"] for line in lines].index("header") == 0
        whole = [
            event
            for number, event in enumerate(events)
            if length >= len(header) + len(b"".join(events[: number + 1]).rstrip(b"\n"))
        ]
        assert found[1:-1] == whole, f"after {length} of {len(written)} bytes"
        assert event_names(tmp_path) == [json.loads(event)["event"] for event in whole] + ["complete"]


def test_bytes_that_are_no_text_at_the_end_are_cut_off(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path, is_main=True)
    log.append("start", world_size=1, steps=1)
    for tail in (b"\x00" * 100, b'{"event": "\xff'):
        with path.open("ab") as file:
            file.write(tail)
        assert set(event_names(tmp_path)) == {"start"}
        log.append("start", world_size=1, steps=1)
        assert path.read_bytes().isascii() and b"\x00" not in path.read_bytes()


def test_two_commands_of_one_run_do_not_cut_off_each_others_lines(tmp_path):
    path = tmp_path / "events.jsonl"
    EventLog(path, is_main=True).append("start", world_size=1, steps=1)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b'{"time": "2026-01-01T00:00:00Z", "event": ')
        file.flush()
        other = threading.Thread(target=lambda: EventLog(path, is_main=True).append("error", message="in use"))
        other.start()
        other.join(timeout=0.3)
        assert other.is_alive()
        file.write(b'"save"}\n')
    other.join(timeout=PATIENCE)
    assert event_names(tmp_path) == ["start", "save", "error"]


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_a_message(tiny_run, tmp_path):
    (tmp_path / "file").touch()
    failed = run_train([*tiny_run, f"run_root={tmp_path / 'file'}", "training.total_steps=1"])
    assert failed.returncode == 2
    assert f"run_root: {tmp_path / 'file'} cannot be written to, it is no folder; change that, or" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_a_tokenizer_that_a_kill_left_half_copied_is_copied_again(tiny_run, small_corpus, tmp_path):
    whole = (small_corpus / "tokenizer" / "tokenizer.model").read_bytes()
    copy = tmp_path / "run" / "tokenizer" / "tokenizer.model"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(whole[: len(whole) // 2])
    assert run_train([*tiny_run, "training.total_steps=1"]).returncode == 0
    assert copy.read_bytes() == whole


@pytest.mark.slow
def test_a_number_of_processes_without_a_rank_is_not_believed(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run_train([*tiny_run, "training.total_steps=1"])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["world_size"] == 1


def test_a_run_that_another_command_began_meanwhile_is_looked_at_again(tiny_run, tmp_path, monkeypatch):
    """The other one begins, with another seed, and ends between the first look at the folder and the lock."""
    config = compose(RunConfig, "train", [*tiny_run, "training.total_steps=1"])
    open_requirements = context.open_requirements

    def overtaken(*arguments):
        found = open_requirements(*arguments)
        with pytest.MonkeyPatch.context() as other:
            other.setattr(context, "open_requirements", open_requirements)
            context.open_run(compose(RunConfig, "train", [*tiny_run, "training.total_steps=1", "seed=5"])).close()
        return found

    monkeypatch.setattr(context, "open_requirements", overtaken)
    with pytest.raises(ConfigError, match="seed: .* was started with another value"):
        context.open_run(config)
    assert "seed: 5" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
