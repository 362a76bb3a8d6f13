"""`python -m launch local` finds what is wrong before processes start, and keeps the exit code that torchrun loses."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from launch.__main__ import main
from tests.runs import PATIENCE, ROOT, environment, run_train
from train.run_directory import read_events


def local(*overrides):
    return main(["local", "--processes", "2", *overrides])


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton kernels run here")
def test_what_files_show_exits_2_with_every_problem(tiny_run, tmp_path, capsys):
    backend = "model.slstm.backend=triton"
    changes = [backend, "model.vocab_size=64", "evaluation.sets.validation.source=books", "+corpus.weights.books=1.0"]
    assert local(*tiny_run, *changes, "training.total_steps=3") == 2
    shown = capsys.readouterr().err
    assert "4 problems" in shown
    assert "model.slstm.backend: 'triton' needs a CUDA device" in shown
    assert "model.vocab_size: 64 is less than the 320 token ids" in shown
    assert "evaluation.sets.validation.source: split 'validation' has no source 'books'; it has text" in shown
    assert "corpus.weights.books: the corpus has no such source" in shown
    assert local(*tiny_run, "training.total_steps=100000", "corpus.max_epochs=2") == 2
    assert "corpus.max_epochs: the run reads source" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes", ["0", "-1", "two"])
def test_a_number_of_processes_that_is_none_exits_2(processes, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["local", f"--processes={processes}", "name=x"])
    assert ended.value.code == 2
    assert f"--processes: {processes} is no positive whole number" in capsys.readouterr().err


def test_a_missing_corpus_exits_2(tmp_path, capsys):
    arguments = ["name=x", f"run_root={tmp_path}", "model=tiny", "training.total_steps=3"]
    assert local(*arguments, f"corpus.directory={tmp_path}/no") == 2
    assert "prepare" in capsys.readouterr().err


@pytest.mark.slow
def test_another_seed_under_the_same_name_exits_2(tiny_run, capsys):
    assert run_train([*tiny_run, "training.total_steps=1"]).returncode == 0
    assert local(*tiny_run, "training.total_steps=2", "seed=5") == 2
    assert "seed:" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, number, reason",
    [(1, signal.SIGINT, "SIGINT"), (2, signal.SIGUSR2, "SIGUSR2")],
)
def test_a_signal_ends_the_run_with_a_checkpoint_and_exits_0(tiny_run, tmp_path, processes, number, reason):
    overrides = [*tiny_run, "training.total_steps=4000"]
    command = [sys.executable, "-m", "launch", "local", "--processes", str(processes), *overrides]
    # Below nohup the tests ignore SIGHUP, and so would the command.
    before = signal.signal(number, signal.SIG_DFL)
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    signal.signal(number, before)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    # A terminal that is gone ends nothing, and is no request.
    process.send_signal(signal.SIGHUP)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert stderr.count(f"{number.name}: the run finishes the step under way") == 1
    assert f"Stopped by {reason}" in stderr and "Traceback" not in stderr
    stop = read_events(tmp_path / "run")[-1]
    assert (stop["event"], stop["reason"]) == ("stop", reason)
    assert (tmp_path / "run" / "checkpoints" / f"step-{stop['step']:08d}" / "complete.json").exists()
