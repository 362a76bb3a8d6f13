"""Corpora, preparations and tokenizers whose files hold anything, be they signed: what is wrong is said, and where."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from conf.stored_values import misfits
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.files import hash_file
from data_pipeline.corpus.inspection import verify_corpus
from data_pipeline.corpus.manifest import InputsEntry, Manifest, TokenizerEntry, fingerprint_of
from data_pipeline.corpus.regroup import merge_corpora, split_corpus
from data_pipeline.corpus.shard_table import ShardTable
from data_pipeline.errors import CorpusError, PrepareError, TokenizerError
from data_pipeline.preparing.claims import Claims
from data_pipeline.preparing.plan import begin_preparation
from data_pipeline.preparing.units import UnitRecord
from data_pipeline.preparing.workers import WorkFolder
from data_pipeline.reading.stream import sequential_batches
from data_pipeline.tokenizing.tokenizer import SIDECAR, Tokenizer
from tests.data_pipeline.small_corpora import quietly, slimpajama_config, write_slimpajama


@pytest.fixture
def copy(corpus, tmp_path) -> Path:
    return shutil.copytree(corpus.directory, tmp_path / "copy")


def change_manifest(folder: Path, section: str | None = None, **changes: object) -> None:
    """Another manifest that is whole by itself."""
    document = json.loads((folder / "manifest.json").read_text())
    document.pop("fingerprint")
    (document if section is None else document[section]).update(changes)
    (folder / "manifest.json").write_text(json.dumps({**document, "fingerprint": fingerprint_of(document)}))


def write_inputs(folder: Path, content: bytes) -> None:
    (folder / "inputs.jsonl").write_bytes(content)
    change_manifest(folder, "inputs", sha256=hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("inputs", {"files": "4"}, "inputs.files cannot be '4'"),
        ("inputs", {"rejected": {"x": "1"}}, "inputs.rejected cannot be"),
        ("inputs", {"lost": []}, "inputs.lost cannot be"),
        ("tokenizer", {"vocab_size": 1.5}, "tokenizer.vocab_size cannot be 1.5"),
        ("tokenizer", {"file": None}, "tokenizer.file cannot be None"),
        ("shards", {"shards": True}, "shards.shards cannot be True"),
        ("report", {"x": 1}, "unknown key report.x"),
        (None, {"report": [1]}, "report is no JSON object"),
        (None, {"block_bytes": "x"}, "block_bytes cannot be 'x'"),
        (None, {"settings": 7}, "settings cannot be 7"),
    ],
)
def test_a_manifest_with_values_of_other_types_is_refused(section, changes, words, copy):
    change_manifest(copy, section, **changes)
    with pytest.raises(CorpusError, match="manifest.json: keys missing or unknown, or values of a wrong type") as error:
        Manifest.read(copy)
    assert words in str(error.value)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_a_manifest_that_no_parser_takes_is_refused(content, copy):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(CorpusError, match="manifest.json: altered or damaged"):
        Manifest.read(copy)


def test_a_manifest_with_what_is_no_number_is_refused(copy):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"block_bytes": 4194304', '"block_bytes": NaN'))
    with pytest.raises(CorpusError, match="manifest.json: altered after it was written"):
        Manifest.read(copy)


def test_an_empty_shard_that_the_table_knows_is_refused(copy):
    manifest = Manifest.read(copy)
    first, *rest = manifest.shards
    (copy / first.file).write_bytes(b"")
    empty = dataclasses.replace(first, **dataclasses.asdict(hash_file(copy / first.file)))
    dataclasses.replace(manifest, shards=ShardTable.from_entries([empty, *rest])).write(copy)
    corpus = Corpus.open(copy)
    with pytest.raises(CorpusError, match="altered: the manifest has 0 checksums for 0 bytes"):
        list(sequential_batches(corpus, first.split, 64, 16, first.source))


def test_a_table_with_numbers_of_labels_that_there_are_not_is_refused(corpus):
    batch = corpus.manifest.shards._batch
    labels = pa.DictionaryArray.from_arrays(pa.array([7] * len(batch), pa.int32()), pa.array(["train"]), safe=False)
    with pytest.raises(pa.ArrowInvalid):
        ShardTable.from_batch(
            batch.set_column(batch.schema.get_field_index("split"), batch.schema.field("split"), labels)
        )


def test_a_claim_that_is_a_link_to_itself_is_none_of_this_process(tmp_path):
    (tmp_path / "unit.0").symlink_to("unit.0")
    with Claims(tmp_path) as claims, claims.take("unit") as mine:
        assert not mine
    assert claims._files("unit") == [tmp_path / "unit.0"]


@pytest.mark.parametrize("content", [b"[1]\n", b"{}\n", b'{"file": 3}\n', b"\xff\n", b"[" * 100_000])
def test_a_list_of_inputs_that_is_none_is_named_by_every_command(content, copy, tmp_path):
    write_inputs(copy, content)
    assert any("inputs.jsonl: " in problem for problem in verify_corpus(copy))
    with pytest.raises(CorpusError, match="inputs.jsonl: "):
        split_corpus(copy, tmp_path / "part")
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("name", ["inputs.jsonl", "report.jsonl"])
def test_an_altered_list_is_not_taken_into_another_corpus(name, copy, corpus, tmp_path):
    with (copy / name).open("ab") as file:
        file.write(b"\xff\n")
    with pytest.raises(CorpusError, match=f"{name}: missing, or altered after it was written"):
        split_corpus(copy, tmp_path / "part")
    (copy / name).unlink()
    with pytest.raises(CorpusError):
        merge_corpora([copy, corpus.directory], tmp_path / "merged")


@pytest.mark.parametrize("content", ["", "[1]", '{"settings": {}, "inputs": [[1]]}', '{"inputs": {}}', "[" * 100_000])
def test_a_plan_that_is_none_is_named_with_what_to_do(content, tmp_path):
    write_slimpajama(tmp_path / "raw", files=1, documents=2)
    config = slimpajama_config(tmp_path / "raw", tmp_path / "out")
    work = WorkFolder(tmp_path / "out")
    work.create()
    work.plan.write_text(content)
    with Claims(work.claims) as claims, pytest.raises(PrepareError, match="plan.json: damaged.*; delete .*out and"):
        begin_preparation(config, tmp_path / "out", [], [], claims)


def test_a_finished_corpus_whose_list_of_inputs_is_damaged_is_not_confirmed(tmp_path):
    write_slimpajama(tmp_path / "raw", files=2, documents=20)
    config = slimpajama_config(tmp_path / "raw", tmp_path / "out")
    quietly(config)
    write_inputs(tmp_path / "out", b"{}\n")
    with pytest.raises(CorpusError, match="inputs.jsonl: line 1 is no account of an input file; restore it"):
        quietly(config)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": [7]},
        {"inputs": [{}]},
        {"inputs": "x"},
        {"report": [{"action": "rejected"}]},
        {"unit": "0"},
        {"new": 1},
        # Of whole types, and of nothing that a unit could have written.
        {"inputs": []},
    ],
)
def test_the_record_of_a_unit_that_is_none_has_the_unit_done_again(change, corpus, tmp_path):
    entry = corpus.manifest.shards[0]
    line = {"file": "a", "bytes": 1, "unit": 0, "rejected": {}, "repaired": {}}
    line |= {"records": entry.documents, "documents": entry.documents}
    path = tmp_path / "000000.json"
    UnitRecord(0, "reference", [entry], [line], []).write(path)
    assert UnitRecord.read(path) is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert UnitRecord.read(path) is None
    path.write_text("[" * 100_000)
    assert UnitRecord.read(path) is None


@pytest.mark.parametrize("content", ["[1]", "7", "[" * 100_000])
def test_a_claim_that_tells_no_holder_is_one_of_another_machine(content, tmp_path):
    with Claims(tmp_path) as claims:
        (tmp_path / "unit.0").write_text(content)
        with claims.take("unit") as mine:
            assert not mine


@pytest.mark.parametrize("name", ["sentencepiece_file", "hugging_face_file"])
@pytest.mark.parametrize("damage", ["empty", "half", "zeros"])
def test_a_damaged_tokenizer_is_named(name, damage, request, tmp_path):
    whole = Path(request.getfixturevalue(name))
    content = whole.read_bytes()
    path = tmp_path / whole.name
    path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "zeros": bytes(len(content))}[damage])
    with pytest.raises(TokenizerError, match=whole.name):
        Tokenizer.load(path, "</s>")


@pytest.mark.parametrize("content", ['{"eod_token": 7}', "[1]", "{}", "\xff", "[" * 100_000])
def test_a_sidecar_that_names_no_token_is_refused(content, sentencepiece_file, tmp_path):
    shutil.copy(sentencepiece_file, tmp_path / "tokenizer.model")
    (tmp_path / SIDECAR).write_text(content)
    with pytest.raises(TokenizerError, match=f"{SIDECAR}: damaged, names no eod_token"):
        Tokenizer.load(tmp_path)


def test_values_are_compared_with_the_types_of_fields():
    entry = {"file": "a", "sha256": "", "files": 1, "records": 1, "documents": 1, "rejected": {}, "repaired": {}}
    assert misfits(InputsEntry, entry) == []
    assert misfits(InputsEntry, {**entry, "rejected": {"x": 1}, "lost": {"bytes": 2}}) == []
    assert misfits(InputsEntry, {**entry, "files": True, "x": 1}, "inputs.") == [
        "unknown key inputs.x",
        "inputs.files cannot be True",
    ]
    assert misfits(TokenizerEntry, None) == ["it is no JSON object"]
    assert "key file is missing" in misfits(TokenizerEntry, {})
