"""Files of a later version of this program: every reader says so, and what to do; none passes over them."""

import json
import re
import shutil

import pyarrow as pa
import pytest

from conf import ConfigError, compose
from conf.problems import is_later_format, other_format
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.manifest import Manifest
from data_pipeline.corpus.shards import Shard
from data_pipeline.errors import CorpusError, TokenizerError
from data_pipeline.tokenizing.tokenizer import Tokenizer
from model.__main__ import main as model_main
from model.loading import load
from model.locate import locate
from model.weights import WeightsError
from tests.train.plain_runs import copied_run, run_plainly, saved_run
from train.checkpoints.layout import CheckpointError
from train.checkpoints.reader import check
from train.checkpoints.state import read_state
from train.config import RunConfig
from train.report import main as report_main
from train.requirements import open_requirements
from train.run_directory import read_events

ADVICE = "a later version wrote it: upgrade xlstm-pretrain"


@pytest.fixture(scope="module")
def base(small_corpus, tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("later"), small_corpus, "training.total_steps=2")


@pytest.fixture
def run(base, tmp_path):
    """(a copy of a run of two checkpoints, what starts it)"""
    return copied_run(base, tmp_path)


def make_later(path):
    """Write `path` as a later version might."""
    text = path.read_text()
    header, *rest = text.splitlines(keepends=True) if path.suffix == ".jsonl" else [text]
    later = json.loads(header) | {"format_version": 9, "new": [1]}
    path.write_text(json.dumps(later) + "\n" + "".join(rest))
    return rf"{re.escape(str(path))} has format_version 9; this version of xlstm-pretrain reads \d; {ADVICE}$"


def test_a_version_is_later_only_where_it_is_a_larger_number():
    assert [version for version in (1, 2, "2", 10, None, "new", [2]) if is_later_format(version, 1)] == [2, "2", 10]
    assert other_format("f", "1", 1) == "" == other_format("f", 1, 1)
    assert other_format("f", 2, 1) == f"f has format_version 2; this version of xlstm-pretrain reads 1; {ADVICE}"
    for version in (None, 1):
        assert (
            other_format("f", version, 2) == f"f has format_version {version}; this version of xlstm-pretrain reads 2"
        )


@pytest.mark.parametrize(
    "name",
    [
        "plan.json",
        "events.jsonl",
        "metrics.jsonl",
        "checkpoints/step-00000002/complete.json",
        "checkpoints/step-00000002/state.json",
    ],
)
def test_a_run_of_a_later_version_is_refused_and_left_as_it_is(run, name):
    folder, overrides = run
    message = make_later(folder / name)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # Not the checkpoint before it, and nothing written in the old format.
    for more in ([], ["training.total_steps=3"]):
        with pytest.raises(ConfigError) as caught:
            open_requirements(compose(RunConfig, "train", [*overrides, *more]), 1)
        (problem,) = caught.value.problems
        assert re.match(message, problem)
    with pytest.raises(ConfigError):
        run_plainly([*overrides, "training.total_steps=3"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_commands_about_a_run_refuse_a_later_version(run, capsys):
    folder, _ = run
    events, metrics = make_later(folder / "events.jsonl"), make_later(folder / "metrics.jsonl")
    with pytest.raises(ValueError, match=events):
        read_events(folder)
    assert report_main([str(folder)]) == 2
    assert re.search(metrics, capsys.readouterr().err.strip())
    assert model_main(["describe", str(folder)]) == 2
    printed = capsys.readouterr().err
    assert re.search(events, printed, re.MULTILINE) and re.search(metrics, printed, re.MULTILINE)


def test_every_reader_of_a_checkpoint_refuses_a_later_version(run, capsys):
    folder = run[0] / "checkpoints" / "step-00000002"
    state = make_later(folder / "state.json")
    with pytest.raises(CheckpointError, match=state):
        read_state(folder)
    model = make_later(folder / "weights" / "model.json")
    with pytest.raises(WeightsError, match=model):
        load(folder)
    marker = make_later(folder / "complete.json")
    for reader in (locate, load):
        with pytest.raises(WeightsError, match=marker):
            reader(folder)
    (problem,) = check(folder)
    assert re.match(marker, problem)
    assert model_main(["generate", f"checkpoint={run[0]}"]) == 2
    assert re.search(marker, capsys.readouterr().err.strip())
    # Whose model.json says nothing that this version can read.
    (folder / "complete.json").unlink()
    alone = shutil.copytree(folder / "weights", run[0] / "alone")
    (alone / "model.json").write_text('{"format_version": 9, "network": {}}')
    with pytest.raises(WeightsError, match=f"model.json has format_version 9; .* {ADVICE}$"):
        load(alone)


def test_every_reader_of_a_corpus_refuses_a_later_version(small_corpus, tmp_path):
    corpus = shutil.copytree(small_corpus, tmp_path / "corpus")
    sidecar = make_later(corpus / "tokenizer" / "end_of_document.json")
    with pytest.raises(TokenizerError, match=sidecar):
        Tokenizer.load(corpus / "tokenizer")
    manifest = make_later(corpus / "manifest.json")
    for reader in (Corpus.open, Manifest.read):
        with pytest.raises(CorpusError, match=manifest):
            reader(corpus)
    path = next((corpus / "shards").rglob("*.arrow"))
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    table = table.replace_schema_metadata({**table.schema.metadata, b"shard_format_version": b"2"})
    with pa.ipc.new_file(tmp_path / "later.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(CorpusError, match=rf"later.arrow has shard_format_version 2; .*reads 1; {ADVICE}$"):
        Shard(tmp_path / "later.arrow")


def test_counted_baselines_of_a_later_version_are_not_drawn(run, capsys):
    path = run[0] / "baselines.json"
    path.write_text('{"format_version": 2}')
    baselines = make_later(path)
    assert report_main([str(run[0])]) == 2
    assert re.search(baselines, capsys.readouterr().err.strip())
