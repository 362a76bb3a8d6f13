"""Several processes and several commands on one corpus: the same bytes, whoever did what and whatever was killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from data_pipeline.corpus.inspection import verify_corpus
from data_pipeline.corpus.manifest import Manifest
from data_pipeline.errors import PrepareError
from data_pipeline.preparing import claims as claims_module
from data_pipeline.preparing import prepare as prepare_module
from data_pipeline.preparing.claims import Claims
from data_pipeline.preparing.plan import refuse_strangers
from data_pipeline.preparing.units import UnitRecord
from data_pipeline.preparing.workers import WorkFolder, task_of
from tests.data_pipeline.commands import contents, finish, never_finished, start
from tests.data_pipeline.small_corpora import quietly, slimpajama_config, write_slimpajama
from tests.runs import PATIENCE


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """The input, and what one undisturbed process makes of it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_slimpajama(folder / "raw", files=12, documents=30)
    finish(start(folder / "raw", folder / "out"))
    return folder / "raw", contents(folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_workers_does_not_change_a_byte(expected, tmp_path, workers):
    raw, bytes_of_one = expected
    finish(start(raw, tmp_path / "out", f"workers={workers}"))
    assert contents(tmp_path / "out") == bytes_of_one
    assert verify_corpus(tmp_path / "out") == []


@pytest.mark.slow
def test_killed_at_random_and_restarted_it_writes_the_same_bytes(expected, tmp_path):
    raw, bytes_of_one = expected
    rng = random.Random(1)
    out = tmp_path / "killed"
    # Finished units at which the kill comes, plus some milliseconds.
    for goal, workers in ((0, 2), (1, 1), (3, 3), (8, 1)):
        with never_finished(out, unit=13):
            process = start(raw, out, f"workers={workers}")
            while process.poll() is None and len(WorkFolder(out).finished()) < goal:
                time.sleep(0.002)
            time.sleep(rng.random() * (0.8 if goal == 0 else 0.03))
            process.send_signal(signal.SIGKILL)
            _, errors = process.communicate()
            assert process.returncode == -signal.SIGKILL, errors
    assert not (out / "manifest.json").exists()
    finish(start(raw, out, "workers=2"))
    assert contents(out) == bytes_of_one


@pytest.mark.slow
def test_a_slurm_array_shares_the_work_and_its_last_task_finishes(expected, tmp_path):
    raw, bytes_of_one = expected
    array = {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "5", "SLURM_ARRAY_TASK_COUNT": "3"}
    tasks = [start(raw, tmp_path / "out", **array, SLURM_ARRAY_TASK_ID=str(n)) for n in (3, 4, 5)]
    logs = [finish(task) for task in tasks]
    assert contents(tmp_path / "out") == bytes_of_one
    assert any("prepared 420 documents" in log for log in logs)
    assert "already prepared" in finish(start(raw, tmp_path / "out", "task_index=1", "task_count=3"))


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    assert process.poll() is None, process.communicate()
    return [child for child in psutil.Process(process.pid).children() if "spawn_main" in str(child.cmdline())]


def is_stopped_while_it_reads(child: psutil.Process) -> bool:
    """Stop a process where it has an input open; one that has none goes on."""
    child.suspend()
    # It stops a moment after the signal, and what it has open then is what it will die with.
    while child.status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)
    if any("/example_" in file.path for file in child.open_files()):
        return True
    child.resume()
    return False


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_command_and_loses_nothing(expected, tmp_path):
    raw, bytes_of_one = expected
    with never_finished(tmp_path / "out", unit=13):
        process = start(raw, tmp_path / "out", "workers=2")
        while not (children := workers_of(process)):
            time.sleep(0.01)
        children[0].send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert (
        "one of 2 workers was killed by signal 9 (out of memory?)" in errors and "run the same command again" in errors
    )
    finish(start(raw, tmp_path / "out"))
    assert contents(tmp_path / "out") == bytes_of_one


@pytest.mark.slow
def test_the_input_on_which_a_worker_dies_is_named(tmp_path):
    """A library that aborts on a file leaves no other trace of it."""
    write_slimpajama(tmp_path / "raw", files=4, documents=5000)
    process = start(tmp_path / "raw", tmp_path / "out", "workers=2")
    while not any(is_stopped_while_it_reads(child) for child in workers_of(process)):
        time.sleep(0.002)
    child = next(child for child in workers_of(process) if child.status() == psutil.STATUS_STOPPED)
    child.send_signal(signal.SIGABRT)
    child.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert re.search(r"one of 2 workers was killed by signal 6 while it read \S+/example_\S+ \(out of memory", errors)


@pytest.mark.slow
def test_an_error_of_a_worker_is_the_error_of_the_command(tmp_path):
    write_slimpajama(tmp_path / "raw")
    path = tmp_path / "raw" / "train" / "chunk1" / "example_train_1.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-5])
    config = replace(slimpajama_config(tmp_path / "raw", tmp_path / "out"), workers=2)
    with pytest.raises(
        PrepareError, match=r"1 damaged files.*\n  train/chunk1/example_train_1\.jsonl\.zst, record \d+"
    ):
        quietly(config)


def test_units_that_another_command_holds_are_left_to_it(tmp_path):
    write_slimpajama(tmp_path / "raw")
    config = slimpajama_config(tmp_path / "raw", tmp_path / "out")
    with Claims(WorkFolder(tmp_path / "out").claims) as other, other.take("000002") as mine:
        assert mine
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes").touch()
        with pytest.raises(PrepareError, match="not empty"):
            quietly(replace(config, output=str(tmp_path / "mine")))
        WorkFolder(tmp_path / "out").create()
        manifest, log = quietly(config)
        assert manifest is None
        assert "5 of 6 units are finished, other commands work on the rest; the last one to end finishes" in log
    manifest, log = quietly(config)
    assert manifest.inputs.documents == 180


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"ID": "7", "MIN": "7", "MAX": "7", "COUNT": "1"}, (0, 1)),
        ({"ID": "5", "MIN": "0", "MAX": "9", "COUNT": "10"}, (5, 10)),
        ({"ID": "9", "MIN": "1", "MAX": "13", "COUNT": "4", "STEP": "4"}, (2, 4)),
        ({"ID": "9", "MIN": "1", "MAX": "20", "COUNT": "3"}, None),
    ],
)
def test_the_place_in_a_slurm_array(tmp_path, monkeypatch, variables, expected):
    config = slimpajama_config(tmp_path, tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    if expected is None:
        with pytest.raises(PrepareError, match="3 tasks with ids from 1 to 20, not in equal steps; set task_index"):
            task_of(config)
    else:
        assert task_of(config) == expected
    assert task_of(replace(config, task_index=3, task_count=8)) == (3, 8)


def test_only_one_claim_at_a_time_and_none_after_its_end(tmp_path):
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        with first.take("x") as mine, second.take("x") as also_mine, second.take("y") as other:
            assert (mine, also_mine, other) == (True, False, True)
            assert second.surely_held("x") and not second.surely_held("z")
        with second.take("x") as mine:
            assert mine
        assert list(tmp_path.iterdir()) == []


def claim_and_die(claims: Claims, lines: int) -> bool:
    """Claim "x" in a child process that is killed after so many lines of code; whether it came to that."""
    child = os.fork()
    if child == 0:
        left = lines

        def trace(frame, event, _):
            nonlocal left
            if frame.f_code is not Claims._create.__code__:
                return None
            left -= event == "line"
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        claims._create("x")
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def test_a_kill_at_any_line_of_claiming_leaves_nothing_to_wait_for(tmp_path):
    claims = Claims(tmp_path)
    lines = 0
    while claim_and_die(claims, lines):
        with claims.take("x") as mine:
            assert mine, f"killed after {lines} lines of claiming"
        lines += 1
    assert lines >= 6


def write_claim(folder: Path, **changes: object) -> Path:
    identity = {"machine": claims_module._machine(), "pid": os.getpid(), "started": 1.0}
    (folder / "x.0").write_text(json.dumps({**identity, **changes}))
    return folder / "x.0"


def test_a_claim_ends_with_its_process_on_this_machine(tmp_path):
    dead, zombie = (subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2))
    holders = [claims_module._identity(process.pid) for process in (dead, zombie)]
    assert None not in holders
    dead.communicate(b"\n")
    zombie.stdin.close()
    while ") Z" not in Path(f"/proc/{zombie.pid}/stat").read_text():
        time.sleep(0.01)
    for changes in (*holders, {"started": 1.0}):
        write_claim(tmp_path, **changes)
        with Claims(tmp_path) as claims, claims.take("x") as mine:
            assert mine and [p.name for p in sorted(tmp_path.iterdir())] == ["x.0", "x.1"]
        assert list(tmp_path.iterdir()) == []
    zombie.wait()


def test_a_claim_of_another_machine_ends_when_nothing_touches_it(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(claims_module, "time", SimpleNamespace(monotonic=lambda: now))
    path = write_claim(tmp_path, machine=["elsewhere"])
    with Claims(tmp_path) as claims:
        for touch in range(4):
            with claims.take("x") as mine:
                assert not mine
            assert claims.surely_held("x") == (touch > 0)
            now += 0.8 * claims_module.LEASE_SECONDS
            os.utime(path, (touch, touch))
        with claims.take("x") as mine:
            assert not mine
        now += 1.2 * claims_module.LEASE_SECONDS
        with claims.take("x") as mine:
            assert mine


def test_a_claim_that_came_and_went_between_look_and_act_is_not_taken_twice(tmp_path, monkeypatch):
    write_claim(tmp_path)
    with Claims(tmp_path) as slow, Claims(tmp_path) as fast, Claims(tmp_path) as third:
        overtaken = contextlib.ExitStack()

        def have_ended(files: list[Path]) -> bool:
            """The dead claim has ended; before the claim after it is made, others take, release and take anew."""
            monkeypatch.undo()
            with fast.take("x") as mine:
                assert mine and files == [tmp_path / "x.0"]
            assert overtaken.enter_context(third.take("x"))
            return True

        monkeypatch.setattr(slow, "_have_ended", have_ended)
        with overtaken, slow.take("x") as mine:
            assert not mine
            assert [p.name for p in tmp_path.iterdir()] == ["x.0"]
        with slow.take("x") as mine:
            assert mine


def test_whoever_reads_the_records_before_the_last_one_is_written_does_not_leave_the_corpus_unfinished(
    tmp_path, monkeypatch
):
    """One command holds the claim to finish and has read all records but the last, which another writes only now."""
    write_slimpajama(tmp_path / "raw")
    config = slimpajama_config(tmp_path / "raw", tmp_path / "out")
    folder = WorkFolder(tmp_path / "out")
    create, records = Claims._create, WorkFolder.sound_records
    found_taken = threading.Event()
    results = []
    last = threading.Thread(target=lambda: results.append(quietly(config)[0]))

    def observed(claims: Claims, name: str) -> Path | None:
        path = create(claims, name)
        if name == "finish" and path is None:
            found_taken.set()
        return path

    def overtaken(work: WorkFolder) -> dict[int, UnitRecord]:
        read = records(work)
        if len(read) < 6:
            held.close()
            last.start()
            assert found_taken.wait(60)
        return read

    monkeypatch.setattr(Claims, "_create", observed)
    monkeypatch.setattr(WorkFolder, "sound_records", overtaken)
    held = contextlib.ExitStack()
    assert held.enter_context(held.enter_context(Claims(folder.claims)).take("000002"))
    results.append(quietly(config)[0])
    last.join(60)
    assert not last.is_alive() and len(folder.finished()) == 0 and not folder.path.exists()
    assert results == [Manifest.read(tmp_path / "out")] * 2


def test_a_record_that_cannot_be_read_is_made_again_by_whoever_finds_it(tmp_path, monkeypatch):
    write_slimpajama(tmp_path / "raw")
    config = slimpajama_config(tmp_path / "raw", tmp_path / "out")
    run = prepare_module.run_workers
    calls = []

    def tear(*arguments):
        """Run the workers; the first time, the machine's crash leaves an empty record."""
        run(*arguments)
        if not calls:
            WorkFolder(tmp_path / "out").record(3).write_bytes(b"")
        calls.append(1)

    monkeypatch.setattr(prepare_module, "run_workers", tear)
    manifest, _ = quietly(config)
    assert manifest.inputs.documents == 180 and len(calls) == 2


def test_a_folder_that_another_command_begins_to_fill_is_no_strangers(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    iterdir = Path.iterdir

    def begun(path: Path) -> Iterator[Path]:
        """Between two steps of this command the other one writes its plan and its tokenizer."""
        WorkFolder(folder).create()
        WorkFolder(folder).plan.write_text("{}")
        (folder / "tokenizer").mkdir(exist_ok=True)
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", begun)
    refuse_strangers(folder)
    WorkFolder(folder).plan.unlink()
    monkeypatch.undo()
    with pytest.raises(PrepareError, match="not empty"):
        refuse_strangers(folder)


@pytest.mark.parametrize("step", ["open_source", "cut_units", "begin_preparation", "run_workers"])
def test_a_command_that_comes_when_another_finishes_finds_the_corpus_prepared(tmp_path, monkeypatch, step):
    write_slimpajama(tmp_path / "raw")
    config = slimpajama_config(tmp_path / "raw", tmp_path / "out")
    finished, _ = quietly(replace(config, output=str(tmp_path / "other")))

    function = getattr(prepare_module, step)
    done = []

    def overtaken(*arguments):
        """The other command writes the manifest and removes the work folder just before this step."""
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "other", tmp_path / "out")
        # What this command has open and made before is what it would find.
        if step in ("begin_preparation", "run_workers"):
            WorkFolder(tmp_path / "out").claims.mkdir(parents=True)
        monkeypatch.setattr(prepare_module, step, function)
        return function(*arguments)

    def count(*arguments):
        done.append(arguments)

    monkeypatch.setattr("data_pipeline.preparing.workers.run_unit", count)
    monkeypatch.setattr(prepare_module, step, overtaken)
    manifest, log = quietly(config)
    assert manifest == finished and "already prepared" in log
    assert contents(tmp_path / "out") == contents(tmp_path / "other") and not done
