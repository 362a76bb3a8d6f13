"""Labels are found where the name of their field leads; one that no record has is refused with the fields there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from data_pipeline.errors import CorpusError, PrepareError
from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.reading.live import LiveCorpus, LiveStream
from data_pipeline.sources.config import DataConfig, SplitConfig
from data_pipeline.sources.fields import SHOWN_FIELDS, columns_of, describe_fields, look_up
from data_pipeline.sources.source import Document
from data_pipeline.sources.sources import open_source
from data_pipeline.tokenizing.config import TokenizerConfig
from tests.data_pipeline.commands import contents
from tests.data_pipeline.small_corpora import TOKENIZER, quietly, sample_texts

Rows = list[dict[str, object]]


def write_json_lines(folder: Path, rows: Rows) -> None:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(folder: Path, rows: Rows) -> None:
    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")


def write_arrow_file(folder: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_arrow_stream(folder: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_saved_data_set(folder: Path, rows: Rows) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))


WRITERS = (write_json_lines, write_parquet, write_arrow_file, write_arrow_stream, write_saved_data_set)
in_every_format = pytest.mark.parametrize("write", WRITERS)


def config(folder: Path, write: Callable[[Path, Rows], None], **changes: object) -> DataConfig:
    kind = "datasets" if write is write_saved_data_set else "records"
    files = [] if kind == "datasets" else ["*"]
    settings = {"kind": kind, "files": files, "split": SplitConfig(validation_fraction=0, unit="document")}
    return DataConfig(path=str(folder), **{**settings, **changes})


def raw_folder(tmp_path: Path, write: Callable[[Path, Rows], None], rows: Rows) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    write(folder, rows)
    return folder


def sources(data: DataConfig) -> list[str]:
    source = open_source(data)
    found = [record for item in source.inputs() for record in source.read(item, lambda count: None)]
    return [record.source for record in found if isinstance(record, Document)]


@in_every_format
@pytest.mark.parametrize(
    "row",
    [
        {"meta.set": "here"},
        {"meta": {"set": "here"}},
        {"meta": json.dumps({"set": "here"})},
        {"meta.set": "here", "meta": {"set": "not here"}},
    ],
)
def test_a_label_is_found_by_its_whole_name_or_as_a_path(tmp_path, write, row):
    folder = raw_folder(tmp_path, write, [{"text": "some text", **row}])
    assert sources(config(folder, write, source_field="meta.set")) == ["here"]


@pytest.mark.parametrize(
    ("record", "value"),
    [
        ({"a.b.c": 1, "a": {"b": {"c": 2}}}, 1),
        ({"a.b": {"c": 1}, "a": {"b.c": 2}}, 1),
        ({"a": {"b.c": 1, "b": {"c": 2}}}, 1),
        ({"a": {"b": {"c": 1}}}, 1),
        ({"a.b.c": None, "a.b": {}, "a": {"b": '{"c": 1}'}}, 1),
        ({"a": {"b": 1}, "c": 2}, None),
        ({"a": "not JSON"}, None),
        ({"a": "[" * 100_000}, None),
    ],
)
def test_the_longest_name_comes_first(record, value):
    assert look_up(record, "a.b.c") == value
    assert set(columns_of("a.b.c", list(record))) == set(record) - {"c"}


@in_every_format
def test_a_label_that_no_document_has_is_refused_with_the_fields_there_are(tmp_path, write):
    rows: Rows = [{"text": text, "meta": {"set": "a", "part": 1}, "url": "u"} for text in sample_texts()]
    folder = raw_folder(tmp_path, write, rows)
    data = config(folder, write, source_field="meta.sett")
    lines: list[str] = []
    with pytest.raises(PrepareError) as error:
        quietly(PrepareConfig(data, TOKENIZER, str(tmp_path / "out")), lines)
    first = (
        "The first record has no text in data.source_field=meta.sett; its fields are: text, meta.set, meta.part, url."
    )
    assert "data.source_field=meta.sett: none of 30 documents has such a source label" in str(error.value)
    assert first in str(error.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert "its fields are: text, meta.set, meta.part, url. Records without a label count as" in lines[0]
    for label, expected in (("meta.set", ["a"]), (None, ["unknown"])):
        settings = PrepareConfig(replace(data, source_field=label), TOKENIZER, str(tmp_path / f"{label}"))
        manifest, log = quietly(settings)
        assert list(manifest.splits["train"]) == expected and "first record" not in log


def test_a_label_that_is_no_text_in_any_document_is_refused_with_its_type(tmp_path):
    folder = raw_folder(tmp_path, write_json_lines, [{"text": text, "set": 5} for text in sample_texts()])
    data = config(folder, write_json_lines, source_field="set")
    with pytest.raises(PrepareError, match=r"no text in data.source_field=set \(a number\); its fields are: text, set"):
        quietly(PrepareConfig(data, TOKENIZER, str(tmp_path / "out"), workers=2))


@pytest.mark.parametrize("label", ["elsewhere", "unknown"])
def test_one_label_among_many_documents_is_enough(tmp_path, label):
    rows: Rows = [{"text": text} for text in sample_texts()]
    folder = raw_folder(tmp_path, write_json_lines, [*rows, {"text": "the last", "set": label}])
    settings = PrepareConfig(config(folder, write_json_lines, source_field="set"), TOKENIZER, str(tmp_path / "out"))
    manifest, log = quietly(settings)
    assert manifest.inputs.repaired == {"no_source_label": 30} and label in manifest.splits["train"]
    assert "the first record has no text in data.source_field=set; its fields are: text. Records" in log
    quietly(replace(settings, output=str(tmp_path / "two"), workers=2))
    assert contents(tmp_path / "two") == contents(tmp_path / "out")


def test_a_missing_text_field_lists_the_fields_that_are_there(tmp_path):
    folder = raw_folder(tmp_path, write_json_lines, [{"body": "x", "meta": {"id": 1}}] * 3)
    data = config(folder, write_json_lines)
    expected = r"a.jsonl, record 1: no_text: field 'text': no such field; the record's are: body, meta.id"
    with pytest.raises(PrepareError, match=rf"no training document to train the tokenizer on(.|\n)*{expected}"):
        quietly(PrepareConfig(data, TOKENIZER, str(tmp_path / "out")))


@in_every_format
def test_a_missing_text_field_is_named_in_every_format(tmp_path, write, hugging_face_file):
    folder = raw_folder(tmp_path, write, [{"body": "x", "other": "y"}])
    tokenizer = TokenizerConfig(kind="file", path=str(hugging_face_file), eod_token="<|endoftext|>")
    with pytest.raises(PrepareError, match=r"'text'.*body, other"):
        quietly(PrepareConfig(config(folder, write), tokenizer, str(tmp_path / "out")))


def test_a_message_names_a_bounded_number_of_fields():
    assert describe_fields({}) == "none"
    assert describe_fields({"a": {}, "b": {"c": 1}, "d": '{"e": 1}', "f": "{", "g" * 200: 1}) == (
        f"a, b.c, d.e, f, {'g' * 80}..."
    )
    many = describe_fields({f"field{number}": number for number in range(SHOWN_FIELDS + 5)})
    assert many.count("field") == SHOWN_FIELDS and many.endswith(" and 5 more")


def test_reading_live_refuses_a_label_that_no_document_has(tmp_path, sentencepiece_file):
    rows: Rows = [{"text": text, "set": "a"} for text in sample_texts()]
    folder = raw_folder(tmp_path, write_json_lines, rows)
    tokenizer = TokenizerConfig(kind="file", path=str(sentencepiece_file), eod_token="</s>")
    corpus = LiveCorpus(config(folder, write_json_lines, source_field="sett"), tokenizer, "train")
    assert "the first record has no text in data.source_field=sett; its fields are: text, set." in corpus.notes[-1]
    with pytest.raises(
        CorpusError, match="source_field=sett: no document has such a source label.*fields are: text, set"
    ):
        LiveStream(corpus, 8, 0, 1, 1).batch(100_000, 1)
    labelled = LiveCorpus(config(folder, write_json_lines, source_field="set"), tokenizer, "train")
    assert LiveStream(labelled, 8, 0, 1, 1).batch(0, 1).sources == ["a"]
