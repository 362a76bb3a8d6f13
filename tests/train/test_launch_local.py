"""`python -m launch local` finds what is wrong before processes start, and keeps the exit code that torchrun loses."""

import pytest

from launch.__main__ import main
from tests.runs import run_train


def local(*overrides):
    return main(["local", "--processes", "2", *overrides])


def test_what_files_show_exits_2_with_every_problem(tiny_run, tmp_path, capsys):
    changes = ["model.vocab_size=64", "evaluation.sets.validation.source=books", "+corpus.weights.books=1.0"]
    assert local(*tiny_run, *changes, "training.total_steps=3") == 2
    shown = capsys.readouterr().err
    assert "3 problems" in shown
    assert "model.vocab_size: 64 is less than the 320 token ids" in shown
    assert "evaluation.sets.validation.source: split 'validation' has no source 'books'; it has text" in shown
    assert "corpus.weights.books: split 'train' has no such source" in shown
    assert local(*tiny_run, "training.total_steps=100000", "corpus.max_epochs=2") == 2
    assert "corpus.max_epochs: the run reads source" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_corpus_exits_1(tmp_path, capsys):
    assert local("name=x", f"run_root={tmp_path}", f"corpus.directory={tmp_path}/no", "training.total_steps=3") == 1
    assert "prepare" in capsys.readouterr().err


@pytest.mark.slow
def test_another_seed_under_the_same_name_exits_2(tiny_run, capsys):
    assert run_train([*tiny_run, "training.total_steps=1"]).returncode == 0
    assert local(*tiny_run, "training.total_steps=2", "seed=5") == 2
    assert "seed:" in capsys.readouterr().err
