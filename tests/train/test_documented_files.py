"""metrics.jsonl, events.jsonl and checkpoints of real runs hold exactly what docs/training.md says of them."""

import json
import math
import re
import signal
import subprocess
import time

import pytest
from safetensors import safe_open

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.reading.stream import SampleStream
from tests.data_pipeline.small_corpora import quietly, slimpajama_config, write_slimpajama
from tests.documented import has_type, keys_and_types, quoted, table
from tests.runs import PATIENCE, ROOT, TINY_RUN, environment, run_train, train_command
from train.callbacks.metrics_file import read_metrics
from train.run_directory import read_events, read_lines

PAGE = "training.md"
SAMPLES, LENGTH = 8, 32
CHECKPOINT_EVERY = 20


@pytest.fixture(scope="module")
def runs(small_corpus, tmp_path_factory):
    """A folder of runs that went through everything that becomes an event: "run" was stopped by a signal, lost its
    newest checkpoint and was completed; "diverged" failed; "damaged" lacks a shard."""
    root = tmp_path_factory.mktemp("runs")
    base = [f"run_root={root}", f"corpus.directory={small_corpus}", *TINY_RUN]
    # A spike is whatever lies above the running median: no need to provoke one.
    run = [*base, "name=run", "logging.spike_factor=1.0001", "logging.monitor_interval=10", "evaluation.interval=20"]
    run += [f"checkpoint.interval={CHECKPOINT_EVERY}"]
    _stop_after_a_spike([*run, "training.total_steps=10000"], root / "run")
    newest = max((root / "run" / "checkpoints").iterdir())
    (newest / "state.json").write_text("{}")
    end = int(newest.name.removeprefix("step-")) + 5
    changed = ["corpus.window_shards=1", "corpus.allow_changed_data=a test"]
    refused = run_train([*run, f"training.total_steps={end}", changed[0]])
    assert refused.returncode == 2 and "corpus.window_shards: " in refused.stderr
    done = run_train([*run, f"training.total_steps={end}", *changed])
    assert done.returncode == 0, done.stderr

    hot = ["name=diverged", "optimizer.learning_rate=1e30", "schedule.warmup=0", "training.max_skipped_steps=1"]
    failed = run_train([*base, *hot, "training.total_steps=10"])
    assert failed.returncode == 1, failed.stderr
    _lose_a_shard(root, base)
    return root


def _lose_a_shard(root, base):
    """A run of two processes on a corpus without the shard that rank 1 alone reads, and with another one altered."""
    write_slimpajama(root / "raw")
    quietly(slimpajama_config(root / "raw", root / "corpus", shard_bytes=1000))
    touched = {}
    for index, files in enumerate(_files_of_samples(root / "corpus", 10 * SAMPLES)):
        for file in files:
            touched.setdefault(file, []).append(index)
    of_rank_1 = [file for file, indices in touched.items() if all(index % SAMPLES >= SAMPLES // 2 for index in indices)]
    (root / "corpus" / min(of_rank_1, key=touched.get)).unlink()
    altered = root / "corpus" / max(touched, key=lambda file: len(touched[file]))
    data = bytearray(altered.read_bytes())
    data[len(data) // 2] ^= 1
    altered.write_bytes(data)
    overrides = [f"corpus.directory={root / 'corpus'}", "corpus.on_corrupt=skip", "model.vocab_size=448"]
    done = run_train([*base, *overrides, "name=damaged", "training.total_steps=6"], processes=2)
    assert done.returncode == 0, done.stderr


def _files_of_samples(corpus, count):
    stream = SampleStream(Corpus.open(corpus, check="none"), "train", LENGTH, 0)
    return [[file for file, _, _ in stream.origin(index).parts] for index in range(count)]


@pytest.fixture(scope="module")
def end(runs):
    """Steps of "run"."""
    return read_events(runs / "run")[-1]["step"]


def _stop_after_a_spike(overrides, run_directory):
    process = subprocess.Popen(
        train_command(overrides), env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + PATIENCE
    while not any(line["event"] == "spike" for line in read_lines(run_directory / "events.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr


def check_keys(line, documented, common):
    assert line.keys() - common == documented.keys(), line
    for key, words in documented.items():
        assert has_type(line[key], words), f"{key}: {line[key]!r} is not {words}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["header", "train", "evaluation", "statistics", "profiles"])
def test_every_key_of_metrics(runs, kind):
    documented = keys_and_types(table(PAGE, f'key of `kind: "{kind}"`'))
    lines = [line for line in read_lines(runs / "run" / "metrics.jsonl") if line["kind"] == kind]
    assert lines
    for line in lines:
        check_keys(line, documented, {"kind", "step"})
        assert has_type(line["step"], "int")


@pytest.mark.slow
def test_units_of_metrics(runs, end):
    lines = read_metrics(runs / "run")
    assert {line["kind"] for line in lines} == {"train", "evaluation", "statistics", "profiles"}
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, end + 1))
    for line in train:
        assert line["tokens"] == line["step"] * SAMPLES * LENGTH
        # log(384) is the loss of a uniform guess.
        assert 0 < line["loss"] < 1.2 * math.log(384)
        assert line["tokens_per_second"] == pytest.approx(SAMPLES * LENGTH / line["step_seconds"])
        assert line["tokens_per_second_per_gpu"] == line["tokens_per_second"]
        assert line["data_wait_fraction"] == pytest.approx(line["data_wait_seconds"] / line["step_seconds"])
        assert 0 <= line["data_wait_fraction"] <= 1
        assert 0.05 < line["memory_gib"] < 8
    for line in lines:
        if line["kind"] == "evaluation":
            assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
            assert line["tokens"] == 256
        if line["kind"] == "statistics":
            assert all(has_type(value, "float") for value in line["values"].values())
        if line["kind"] == "profiles":
            for name, numbers in line["values"].items():
                assert all(number is None or has_type(number, "float") for number in numbers), name
                if "histogram" in name:
                    assert len(numbers) == 16 and sum(numbers) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_every_key_of_events(runs):
    rows = table(PAGE, "event")
    documented = {}
    for row in rows:
        (event,) = quoted(row[0])
        documented.setdefault(event, {}).update(keys_and_types([row]))
    seen = set()
    for name in ("run", "diverged", "damaged"):
        lines = read_lines(runs / name / "events.jsonl")
        assert [line["event"] for line in lines].index("header") == 0
        assert [line["event"] for line in lines].count("header") == 1
        assert read_events(runs / name) == lines[1:]
        for line in lines:
            check_keys(line, documented[line["event"]], {"time", "event"})
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"])
            seen.add(line["event"])
    # These runs have no GPU and so no kernels to check; rollbacks are in test_rollback.py, W&B's server is in
    # test_wandb_settings.py, what a run begins with in test_origin.py, lost outputs are in test_terminal.py, failed
    # saves in test_failing_disk.py, skipped ones in test_deadline.py, flipped bits in test_troubled_numbers.py, samples
    # left out in test_left_out.py, mirrors in test_mirror.py.
    elsewhere = {"kernel_preflight", "rollback", "wandb_offline", "initialise", "branch", "output_lost", "unreadable"}
    elsewhere |= {"save_failed", "save_skipped", "deviation", "left_out", "mirror", "mirror_failed", "restore"}
    # What ranks and machines are told of is in tests/train/health, networks in test_broken_network.py.
    elsewhere |= {"straggler", "slow_save", "gpu", "network"}
    assert seen == documented.keys() - elsewhere


@pytest.mark.slow
def test_values_of_events(runs):
    (resume,) = [line for line in read_events(runs / "run") if line["event"] == "resume"]
    assert resume["checkpoint"] == f"step-{resume['step']:08d}"
    assert resume["step"] % CHECKPOINT_EVERY == 0
    assert (resume["tokens"], resume["next_sample"]) == (resume["step"] * SAMPLES * LENGTH, resume["step"] * SAMPLES)
    skipped = [line for line in read_events(runs / "diverged") if line["event"] == "skip"]
    assert [line["first_sample"] for line in skipped] == [line["step"] * SAMPLES for line in skipped]
    assert not all(math.isfinite(float(line["grad_norm"])) for line in skipped)
    # What JSON cannot say stands as null in the metrics.
    (line,) = [line for line in read_metrics(runs / "diverged") if line["step"] == skipped[0]["step"] + 1]
    assert line["grad_norm"] is None


@pytest.mark.slow
def test_damage_is_an_event_once_from_the_rank_that_met_it(runs):
    events = [line for line in read_events(runs / "damaged") if line["event"] == "damage"]
    files = _files_of_samples(runs / "corpus", 10 * SAMPLES)
    (missing,) = [line for line in events if "the shard is missing" in line["problem"]]
    (altered,) = [line for line in events if "altered: the 4 MiB block 0" in line["problem"]]
    assert events in ([missing, altered], [altered, missing]) and missing["rank"] == 1
    for line in events:
        mine = [
            index
            for index, names in enumerate(files)
            if any(str(runs / "corpus" / name) in line["problem"] for name in names)
            and index % SAMPLES // (SAMPLES // 2) == line["rank"]
        ]
        assert line["first_sample"] == mine[0] and line["step"] <= mine[0] // SAMPLES


@pytest.mark.slow
def test_every_file_and_key_of_a_checkpoint(runs, end):
    folder = runs / "run" / "checkpoints" / f"step-{end:08d}"
    documented = [name for row in table(PAGE, "file") for name in quoted(row[0])]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert present == {name.replace("RRRRR", "00000") for name in documented}

    state = json.loads((folder / "state.json").read_text())
    check_keys(state, keys_and_types(table(PAGE, "key of `state.json`")), set())
    assert state["step"] == state["applied_steps"] == end and state["skipped_steps"] == 0
    (row,) = [row for row in table(PAGE, "key of `state.json`") if quoted(row[0]) == ["data_identity"]]
    assert state["data_identity"].keys() == set(quoted(row[2])) - {"next_sample"}

    marker = json.loads((folder / "complete.json").read_text())
    assert marker.keys() == {"format_version", "attempt", "files"}
    assert marker["files"].keys() == present - {"complete.json"}
    for name, entry in marker["files"].items():
        assert entry.keys() == {"bytes", "xxh3_128"}
        assert entry["bytes"] == (folder / name).stat().st_size

    model = json.loads((folder / "weights" / "model.json").read_text())
    assert model.keys() == {"format_version", "model"}
    assert json.loads((folder / "random-00000.json").read_text()).keys() == {"python", "numpy", "torch"}
    versions = [state, marker, model]
    for weights in folder.glob("*/weights-*.safetensors"):
        with safe_open(weights, framework="pt") as file:
            assert file.metadata().keys() == {"format_version", "shapes"}
            versions.append({"format_version": int(file.metadata()["format_version"])})
    assert [version["format_version"] for version in versions] == [1] * 6


@pytest.mark.slow
def test_every_file_of_the_run_directory_is_documented(runs):
    documented = {name.split("/")[0] for row in table(PAGE, "path") for name in quoted(row[0])}
    present = {path.name for path in (runs / "run").iterdir()}
    assert present <= documented, present - documented
    for name in ("plan.json", "environment.json", "code.json"):
        content = json.loads((runs / "run" / name).read_text())
        (row,) = [row for row in table(PAGE, "path") if quoted(row[0]) == [name]]
        assert set(quoted(row[1])) - {"train/plan.py", "git diff"} <= content.keys()
