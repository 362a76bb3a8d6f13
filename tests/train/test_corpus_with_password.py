"""A corpus behind a password: it is read with it, and nothing that a run says or keeps has it."""

import json
import logging
import sys

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from conf import ConfigError
from data_pipeline.corpus import file_systems
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.remote import CacheSettings
from data_pipeline.errors import CorpusError
from tests.runs import TINY_RUN
from tests.train.plain_runs import run_plainly
from train.__main__ import main
from train.callbacks.base import Callback
from train.run_directory import read_events

PASSWORD = "correct-horse"
URL = f"memory://me:{PASSWORD}@store/corpus"
SHOWN = "memory://me:***@store/corpus"


class Refusing(MemoryFileSystem):
    """A store that names the password in its own way when it says no."""

    protocol = "refusing"

    def cat_file(self, path, start=None, end=None, **settings):
        raise PermissionError(f"login as me with {PASSWORD} at refusing://me:{PASSWORD}@store")


class Logging(Callback):
    """Logs as a library may."""

    def on_run_start(self, trainer):
        logging.getLogger("elsewhere").warning("reading from %s", URL)
        trainer.events.append("error", message=f"reading from {URL}")


@pytest.fixture(autouse=True)
def store(small_corpus):
    system = fsspec.filesystem("memory")
    system.put(str(small_corpus), "/me:correct-horse@store/corpus", recursive=True)
    yield
    system.rm("/me:correct-horse@store", recursive=True)


@pytest.fixture
def overrides(tmp_path):
    run = [f"run_root={tmp_path}", f"corpus.cache_directory={tmp_path / 'cache'}", *TINY_RUN, "name=run"]
    return [*run, "parallel=zero0", "schedule=constant"]


def files_with_password(folder):
    return [path for path in folder.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]


def test_a_run_reads_with_the_password_and_neither_says_nor_keeps_it(overrides, tmp_path, capfd, monkeypatch):
    run, given = tmp_path / "run", [f"corpus.directory={URL}", *overrides]
    monkeypatch.setattr(sys, "argv", ["train", *given])
    assert run_plainly([*given, "training.total_steps=1", "logging.wandb.mode=offline"]) == 0
    assert f"directory: {SHOWN}" in (run / "config.yaml").read_text()
    assert f"corpus.directory={SHOWN}" in json.loads((run / "environment.json").read_text())["command"]
    state = json.loads((run / "checkpoints" / "step-00000001" / "state.json").read_text())
    assert state["configuration"]["corpus"]["directory"] == SHOWN
    # Where it is not known this is said.
    with pytest.raises(ConfigError, match="its password was not kept; name the corpus with it"):
        run_plainly([f"corpus.directory={SHOWN}", *overrides, "training.total_steps=2"])

    assert run_plainly([*given, "training.total_steps=2"], [Logging()]) == 0
    (resume,) = [event for event in read_events(run) if event["event"] == "resume"]
    assert resume["changes"].keys() == {"training.total_steps", "logging.wandb.mode"}
    assert main(["--plan", *given, "training.total_steps=3"]) == 0
    said = capfd.readouterr()
    assert PASSWORD not in said.out + said.err and SHOWN in said.out
    assert f"reading from {SHOWN}" in (run / "logs" / "rank-00000.log").read_text()
    assert files_with_password(run) == [] == files_with_password(tmp_path / "cache")


def test_a_configuration_of_an_earlier_version_that_kept_it_is_the_same_and_shows_none(overrides, tmp_path, capfd):
    run, given = tmp_path / "run", [f"corpus.directory={URL}", *overrides]
    assert run_plainly([*given, "training.total_steps=1"]) == 0
    for file in (run / "config.yaml", run / "configurations" / "0001.yaml"):
        file.write_text(file.read_text().replace(SHOWN, URL))
    (run / "configurations" / "0001.yaml").unlink()
    assert run_plainly([*given, "training.total_steps=2"]) == 0
    (resume,) = [event for event in read_events(run) if event["event"] == "resume"]
    assert resume["changes"].keys() == {"training.total_steps"}
    assert SHOWN in (run / "configurations" / "0001.yaml").read_text()
    assert PASSWORD not in capfd.readouterr().err and files_with_password(run) == []


def test_no_error_of_a_corpus_shows_the_password(tmp_path, monkeypatch):
    monkeypatch.setattr(file_systems, "FIRST_WAIT_SECONDS", 0)
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    cache = CacheSettings(tmp_path / "cache", 64 * 2**20)
    for url, given in (
        (f"memory://me:{PASSWORD}@store/elsewhere", cache),
        (URL, None),
        (f"nothing://me:{PASSWORD}@store/corpus", cache),
        (f"refusing://me:{PASSWORD}@store/corpus", cache),
    ):
        with pytest.raises(CorpusError) as error:
            Corpus.open(url, cache=given)
        assert PASSWORD not in str(error.value) and "://me:***@store" in str(error.value)
        assert error.value.__cause__ is None
    assert "login as me with *** at refusing://me:***@store" in str(error.value)
    corpus = Corpus.open(URL, cache=cache)
    assert corpus.directory == SHOWN and corpus.tokens("train") > 0
