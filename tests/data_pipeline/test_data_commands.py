"""The command lines, the presets of conf/, and the documentation of the manifest."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from conf import ConfigError, compose
from data_pipeline.__main__ import main
from data_pipeline.corpus.manifest import Manifest
from data_pipeline.preparing.config import PrepareConfig, validate_prepare
from data_pipeline.sources.config import DataConfig, SplitConfig, ToleranceConfig
from data_pipeline.tokenizing.config import TokenizerConfig
from tests.data_pipeline.small_corpora import random_text, write_slimpajama
from tests.documented import has_type, keys_and_types, table
from tests.runs import closed_pipe

ROOT = Path(__file__).parents[2]


def flat_keys(value: object, prefix: str = "") -> set[str]:
    if isinstance(value, dict):
        return {k for key, child in value.items() for k in flat_keys(child, f"{prefix}{key}.")} | {prefix.rstrip(".")}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return flat_keys(value[0], f"{prefix.rstrip('.')}[].")
    return {prefix.rstrip(".")}


def test_a_preparation_goes_on_when_nobody_reads_its_output(tmp_path):
    write_slimpajama(tmp_path / "raw")
    settings = [f"data.path={tmp_path / 'raw'}", f"output={tmp_path / 'out'}", "tokenizer.vocab_size=400"]
    with closed_pipe() as pipe, redirect_stdout(pipe):
        assert main(["prepare", "data=slimpajama", *settings]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_the_command_prepares_verifies_and_inspects(tmp_path, capsys):
    write_slimpajama(tmp_path / "raw")
    out = str(tmp_path / "out")
    settings = [f"data.path={tmp_path / 'raw'}", f"output={out}", "tokenizer.vocab_size=400"]
    assert main(["prepare", "data=slimpajama", *settings]) == 0
    assert "prepared 180 documents" in capsys.readouterr().out
    assert main(["verify", out]) == 0
    assert "every file is as it was written" in capsys.readouterr().out
    assert main(["inspect", out]) == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("180 documents", "RedPajamaBook", "bytes/token", "beginning of the first"))
    sample = ["--sample", "5", "--sequence-length", "50", "--seed", "3", "--weight", "RedPajamaC4=1"]
    assert main(["inspect", out, *sample]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"source RedPajamaC4, epoch 0, sample \d+ of it\n  shards/train/RedPajamaC4-\d+-\d+\.arrow", shown)
    shard = next((tmp_path / "out" / "shards").rglob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["verify", out]) == 1
    assert f"{shard}: truncated" in capsys.readouterr().err
    assert main(["inspect", out]) == 2
    assert main(["inspect", out, "--sample", "0", "--weight", "nobody=1"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["prepare"], 2, "output"),
        (["prepare", "output=x", "data=nowhere"], 2, "standard_library"),
        (["prepare", "output=x", "data.kindd=text"], 2, "data.kind"),
        (
            ["prepare", "output=x", "data=slimpajama", "tokenizer.vocab_size=5"],
            2,
            "data.path: kind=records needs a path",
        ),
        (["prepare", "output=x", "data=text", "data.path=/nowhere/at/all"], 2, "no such file or folder; set data.path"),
        (["inspect", "/nowhere"], 2, "/nowhere: no such folder; prepare a corpus"),
        (["verify", "/nowhere"], 2, "/nowhere: no such folder; prepare a corpus"),
    ],
)
def test_exit_codes_and_messages(tmp_path, monkeypatch, capsys, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message


def test_every_problem_of_a_configuration_is_named_at_once(capsys):
    settings = ["data=jsonl", "data.split.rule=coin", "tokenizer=file", "shard_bytes=0", "output=x"]
    assert main(["prepare", *settings]) == 2
    message = capsys.readouterr().err
    for key in ("data.path:", "data.split.rule:", "tokenizer.path:", "shard_bytes:"):
        assert key in message
    assert message.startswith("4 problems")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"kind": "csv"}, "data.kind: no such kind ('csv')"),
        ({"path": "x"}, "data.path: kind=standard_library finds its own path ('x')"),
        ({"kind": "text", "path": "x"}, "data.files: no patterns"),
        ({"kind": "datasets", "path": "x", "files": ["*"]}, "data.files: kind=datasets does not use patterns"),
        ({"subset": "en"}, "data.subset: only kind=datasets uses it ('en')"),
        ({"source_field": "meta"}, "data.source_field: kind=standard_library has no fields"),
        ({"text_field": ""}, "data.text_field: empty"),
        ({"source": ""}, "data.source: empty"),
        ({"split": SplitConfig(rule="given")}, "data.split.rule: the standard library has no split folders"),
        ({"split": SplitConfig(unit="line")}, "data.split.unit: no such unit ('line')"),
        ({"split": SplitConfig(validation_fraction=1.5)}, "data.split.validation_fraction: must be at least 0"),
        ({"split": SplitConfig(validation_fraction=0.6, test_fraction=0.6)}, "data.split: validation_fraction + test"),
    ],
)
def test_impossible_data_settings(change, key):
    config = PrepareConfig(replace(DataConfig(), **change), TokenizerConfig(), "out")
    assert any(problem.startswith(key) for problem in validate_prepare(config)), validate_prepare(config)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"kind": "magic"}, "tokenizer.kind: no such kind ('magic')"),
        ({"path": "x"}, "tokenizer.path: a trained tokenizer has no path ('x')"),
        ({"eod_token": "x"}, "tokenizer.eod_token: a trained tokenizer ends documents with '</s>'"),
        ({"model_type": "word"}, "tokenizer.model_type: no such type ('word')"),
        ({"vocab_size": 100}, "tokenizer.vocab_size: must be at least 300 (100)"),
        ({"sample_bytes": 0}, "tokenizer.sample_bytes: must be positive (0)"),
        ({"character_coverage": 2.0}, "tokenizer.character_coverage: must be between 0.9 and 1 (2.0)"),
    ],
)
def test_impossible_tokenizer_settings(change, key):
    config = PrepareConfig(DataConfig(), replace(TokenizerConfig(), **change), "out")
    assert [p for p in validate_prepare(config) if p.startswith(key)], validate_prepare(config)


@pytest.mark.parametrize("tokenizer", ["sentencepiece_4k", "sentencepiece_32k", "file"])
@pytest.mark.parametrize("data", sorted(path.stem for path in (ROOT / "conf" / "data").glob("*.yaml")))
def test_presets_are_valid(data, tokenizer):
    overrides = [f"data={data}", f"tokenizer={tokenizer}", "output=x"]
    overrides += [] if data == "standard_library" else ["data.path=/some/where"]
    overrides += ["tokenizer.path=/some/file"] if tokenizer == "file" else []
    assert validate_prepare(compose(PrepareConfig, "prepare", overrides)) == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"workers": 0}, "workers: must be between 1 and 1024 (0)"),
        ({"task_index": 1}, "task_index: task_index and task_count go together"),
        ({"task_count": 4}, "task_count: task_index and task_count go together"),
        ({"task_index": 4, "task_count": 4}, "task_index: must be at least 0 and below task_count (4 of 4)"),
        ({"source": "/some/where"}, "source: data=standard_library finds its own path ('/some/where')"),
        (
            {"source": "/a", "data": DataConfig(kind="text", path="/b", files=["*"])},
            "source: data.path is set too ('/a' and '/b')",
        ),
        (
            {"data": DataConfig(tolerance=ToleranceConfig(rejected_fraction=2))},
            "data.tolerance.rejected_fraction: must",
        ),
        ({"data": DataConfig(tolerance=ToleranceConfig(damaged_files=-1))}, "data.tolerance.damaged_files: must be at"),
        ({"data": DataConfig(max_record_bytes=0)}, "data.max_record_bytes: must be between 1 and 1073741824 (0)"),
        (
            {"data": DataConfig("jsonl", "raw", ["*"], max_reader_bytes=1000)},
            "data.max_reader_bytes: must be between 16777216 and 1099511627776 (1000)",
        ),
        (
            {"data": DataConfig("datasets", "raw", max_reader_bytes=2**25)},
            "data.max_reader_bytes: kind=datasets does not use it (33554432); leave it out",
        ),
        ({"tokenizer": TokenizerConfig(backend="magic")}, "tokenizer.backend: no such library ('magic')"),
    ],
)
def test_impossible_ways_to_work(change, key):
    config = replace(PrepareConfig(DataConfig(), TokenizerConfig(), "out"), **change)
    assert [p for p in validate_prepare(config) if p.startswith(key)], validate_prepare(config)


def test_the_source_key_names_a_path_or_a_data_set(tmp_path, capsys):
    write_slimpajama(tmp_path / "raw")
    for source in (str(tmp_path / "raw"), f"datasets:{tmp_path / 'raw'}"):
        out = tmp_path / source.partition(":")[0].replace("/", "_")
        settings = ["data=slimpajama", f"source={source}", f"output={out}", "tokenizer.vocab_size=400"]
        assert main(["prepare", *settings]) == 0
        assert "records read 180 = documents written 180 + rejected 0" in capsys.readouterr().out
        assert set(Manifest.read(out).splits["train"]) == {"RedPajamaC4", "RedPajamaGithub", "RedPajamaBook"}


def test_output_is_required():
    with pytest.raises(ConfigError, match="output"):
        compose(PrepareConfig, "prepare", [])


def test_help_is_complete(tmp_path):
    command = [sys.executable, "-m", "data_pipeline"]
    for arguments, words in (
        (["--help"], ["prepare", "inspect", "verify"]),
        (["prepare", "--help"], ["output=DIR", "data=CHOICE", "slimpajama", "goes on where it stopped"]),
    ):
        result = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ)
        assert result.returncode == 0 and all(word in result.stdout for word in words)
    result = subprocess.run([*command, "dance"], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 2 and "invalid choice" in result.stderr


def test_the_manifest_reads_back_and_every_key_is_documented(corpus):
    path = corpus.directory / "manifest.json"
    document = json.loads(path.read_text())
    keys = flat_keys(document) - {"", "shards[]"} | {"shards"}
    # Beyond these, keys are labels, reasons, or the settings of conf/.
    free = r"^(settings|splits|inputs\.rejected|inputs\.repaired)\..*"
    written = {re.sub(free, r"\1", key) for key in keys}
    documented = keys_and_types(table("data_formats.md", "key of `manifest.json`"))
    # Where nothing is lost, it is absent.
    assert documented.keys() - written == {"inputs.lost"} and written <= documented.keys()
    for key in written:
        assert has_type(value_at(document, key), documented[key]), f"{key} is not {documented[key]}"
    assert document["format_version"] == 2

    manifest = Manifest.read(corpus.directory)
    assert manifest.fingerprint == document["fingerprint"] == corpus.fingerprint
    manifest.write(corpus.directory)
    assert json.loads(path.read_text()) == document


def value_at(document: object, key: str) -> object:
    """The value under a dotted key; of a list (`shards[]`) that of the first entry."""
    for part in key.split("."):
        document = document[part.removesuffix("[]")]
        document = document[0] if part.endswith("[]") else document
    return document


def test_every_key_of_the_lines_beside_the_manifest(tmp_path):
    (tmp_path / "raw").mkdir()
    for number in range(20):
        (tmp_path / "raw" / f"{number}.txt").write_text(random_text(random.Random(number), 200), "utf-8")
    (tmp_path / "raw" / "broken.txt").write_bytes(b"caf\xe9")
    settings = [f"data.path={tmp_path / 'raw'}", f"output={tmp_path / 'out'}", "tokenizer.vocab_size=400"]
    assert main(["prepare", "data=text", *settings]) == 0
    for name in ("inputs.jsonl", "report.jsonl"):
        documented = keys_and_types(table("data_formats.md", f"key of `{name}`"))
        lines = [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        assert lines
        for line in lines:
            # Where nothing is lost, it is absent.
            assert line.keys() | ({"lost"} if name == "inputs.jsonl" else set()) == documented.keys()
            for key, value in line.items():
                assert has_type(value, documented[key]), f"{key}: {value!r} is not {documented[key]}"
