"""Readers of every layout: what comes out, in which order, and what is said about the rest."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline.errors import PrepareError
from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.preparing.units import cut_units
from data_pipeline.sources.config import DataConfig, SplitConfig, ToleranceConfig
from data_pipeline.sources.file_sources import natural_key
from data_pipeline.sources.source import Document, Rejection
from data_pipeline.sources.sources import open_source
from data_pipeline.sources.splits import split_by_name, split_by_text
from data_pipeline.tokenizing.config import TokenizerConfig
from tests.data_pipeline.small_corpora import TOKENIZER, quietly, slimpajama_config, write_slimpajama

ALL_TRAIN = SplitConfig(validation_fraction=0)


def records(config: DataConfig) -> list[Document | Rejection]:
    source = open_source(config)
    return [record for item in source.inputs() for record in source.read(item, lambda count: None)]


def line(text: str, label: str | None = "RedPajamaC4") -> str:
    return json.dumps({"text": text, **({"meta": {"redpajama_set_name": label}} if label else {})})


@pytest.mark.parametrize(
    ("name", "fitting"),
    [("a.jsonl", "jsonl"), ("a.jsonl.gz", "jsonl"), ("a.parquet", "parquet"), ("a.arrow", "records")],
)
def test_a_file_of_records_is_not_taken_for_one_text(tmp_path, name, fitting):
    (tmp_path / name).write_text(line("a") + "\n")
    with pytest.raises(PrepareError, match=f"{name}: data.kind=text .* one document; use data={fitting}, or name its"):
        open_source(DataConfig(kind="text", path=str(tmp_path / name), files=["*"]))
    # In a folder, whoever names the ending means it.
    (document,) = records(DataConfig(kind="text", path=str(tmp_path), files=["*"], split=ALL_TRAIN))
    assert document.text == line("a") + "\n"


def jsonl_config(root: Path, **changes: object) -> DataConfig:
    settings = {"files": ["**/*.jsonl*"], "source_field": "meta.redpajama_set_name", "split": ALL_TRAIN}
    return DataConfig(kind="jsonl", path=str(root), **{**settings, **changes})


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".zstd"])
def test_json_lines_plain_and_compressed_also_in_several_frames(tmp_path, suffix):
    compress = {"": bytes, ".gz": gzip.compress}.get(suffix, zstandard.compress)
    halves = [f"{line('first é')}\n{line('second')}\n".encode(), line("third without a line end").encode()]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(compress(half) for half in halves))
    found = records(jsonl_config(tmp_path))
    assert [(d.text, d.source, d.split, d.position) for d in found] == [
        ("first é", "RedPajamaC4", "train", 1),
        ("second", "RedPajamaC4", "train", 2),
        ("third without a line end", "RedPajamaC4", "train", 3),
    ]


def test_the_source_label_as_struct_as_string_and_missing(tmp_path):
    as_string = {"text": "b", "meta": json.dumps({"redpajama_set_name": "RedPajamaBook"})}
    odd = [{"text": "c"}, {"text": "d", "meta": None}, {"text": "e", "meta": "not json"}, {"text": "f", "meta": {}}]
    lines = [line("a", "RedPajamaC4"), *map(json.dumps, [as_string, *odd])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = records(jsonl_config(tmp_path, source="elsewhere"))
    assert [d.source for d in found] == ["RedPajamaC4", "RedPajamaBook", *["elsewhere"] * 4]
    assert [d.unlabelled for d in found] == [False, False, True, True, True, True]


def test_a_label_that_is_no_text_is_none(tmp_path):
    write_slimpajama(tmp_path / "raw", files=1)
    odd = [line("half a pair", "\ud83d"), json.dumps({"text": "a number", "meta": {"redpajama_set_name": 5}})]
    (tmp_path / "raw" / "train" / "odd.jsonl").write_text("\n".join(odd))
    manifest, _ = quietly(slimpajama_config(tmp_path / "raw", tmp_path / "out"))
    assert manifest.splits["train"]["unknown"]["documents"] == manifest.inputs.repaired["no_source_label"] == 2


def test_files_are_read_in_the_order_of_their_numbers(tmp_path):
    for name in ("chunk10/example_2", "chunk2/example_10", "chunk2/example_9", "chunk1/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(line(name))
    expected = ["chunk1/x", "chunk2/example_9", "chunk2/example_10", "chunk10/example_2"]
    assert [d.text for d in records(jsonl_config(tmp_path))] == expected
    assert sorted(["a10b", "a2b", "a02b", "ab"], key=natural_key) == ["a02b", "a2b", "a10b", "ab"]
    assert sorted(["²10", "²2", "1²10", "1²2"], key=natural_key) == ["1²2", "1²10", "²2", "²10"]


def test_what_cannot_be_used_is_reported_with_file_line_and_reason(tmp_path):
    root = tmp_path / "raw"
    write_slimpajama(root, files=1)
    bad = [
        line("good one").encode(),
        b'{"text": "torn',
        b"[1, 2]",
        b"",
        b'{"meta": {}}',
        b'{"text": 5}',
        b'{"text": "\xff"}',
        line("  \n ").encode(),
        b'{"text": "half a pair \\ud83d and a whole \\ud83d\\ude00"}',
        line("with a nul \0 kept").encode(),
    ]
    (root / "train" / "chunk2").mkdir()
    (root / "train" / "chunk2" / "bad.jsonl").write_bytes(b"\n".join(bad))
    whole = "\n".join(line(f"text {i} " + "word " * 50) for i in range(500))
    (root / "train" / "chunk2" / "torn.jsonl.zst").write_bytes(zstandard.compress(whole.encode())[:-20])
    config = slimpajama_config(root, tmp_path / "out")
    with pytest.raises(PrepareError, match="1 damaged files, data.tolerance.damaged_files allows 0") as error:
        quietly(config)
    assert "torn.jsonl.zst, record " in str(error.value) and "bad.jsonl, record 2: malformed" in str(error.value)
    tolerance = ToleranceConfig(rejected_fraction=0.01, damaged_files=1)
    with pytest.raises(
        PrepareError, match=r"\d+ of \d+ records \(.*%\) rejected \(\d+ x damaged_archive, 2 x empty.*1\.000%"
    ):
        quietly(replace(config, data=replace(config.data, tolerance=tolerance)))
    tolerance = ToleranceConfig(rejected_fraction=0.9, damaged_files=1)
    manifest, log = quietly(replace(config, data=replace(config.data, tolerance=tolerance)))
    assert "resuming, 5 of 5 units are finished" in log
    inputs = [json.loads(entry) for entry in (tmp_path / "out" / "inputs.jsonl").read_text().splitlines()]
    torn = next(entry for entry in inputs if "torn" in entry["file"])
    assert torn["documents"] == 0 and torn["rejected"] == {"damaged_archive": torn["records"]}
    assert manifest.inputs.rejected == {
        "damaged_archive": torn["records"],
        "empty": 2,
        "malformed": 2,
        "no_text": 2,
        "not_utf8": 1,
    }
    assert manifest.inputs.repaired == {"lone_surrogate": 1, "no_source_label": 1}
    assert manifest.inputs.records == manifest.inputs.documents + 7 + torn["records"]
    report = [json.loads(entry) for entry in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    places = [(e["action"], e["file"].split("/")[-1], e["position"], e["reason"]) for e in report]
    assert places[:9] == [
        ("rejected", "bad.jsonl", 2, "malformed"),
        ("rejected", "bad.jsonl", 3, "malformed"),
        ("rejected", "bad.jsonl", 4, "empty"),
        ("rejected", "bad.jsonl", 5, "no_text"),
        ("rejected", "bad.jsonl", 6, "no_text"),
        ("rejected", "bad.jsonl", 7, "not_utf8"),
        ("rejected", "bad.jsonl", 8, "empty"),
        ("repaired", "bad.jsonl", 9, "no_source_label"),
        ("repaired", "bad.jsonl", 9, "lone_surrogate"),
    ]
    assert places[9][1] == "torn.jsonl.zst" and "truncated; nothing of the file is used" in report[-1]["detail"]
    assert all(e["records"] == e["documents"] + sum(e["rejected"].values()) for e in inputs)
    assert "rejected malformed: 2 (file and line in" in log


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_is_noticed_wherever_it_is_cut(tmp_path, suffix):
    text = "\n".join(line(f"{i} {hash(i) * 7919 % 100003}") for i in range(3000)).encode()
    data = gzip.compress(text, mtime=0) if suffix == ".gz" else zstandard.compress(text)
    path = tmp_path / f"a.jsonl{suffix}"
    for cut in (1, 5, len(data) // 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        found = records(jsonl_config(tmp_path))
        assert isinstance(found[-1], Rejection) and found[-1].reason == "damaged_archive"
        assert found[-1].position == len(found)
        assert [d.text.split()[0] for d in found[:-1]] == [str(i) for i in range(len(found) - 1)]


def test_text_trees_keep_files_exactly_and_leave_out_what_is_excluded(tmp_path):
    contents = {
        "a.py": "x = 1\r\n\ty\n",
        "sub/b.py": "\ufeffz",
        "sub/deep/c.txt": "t",
        "skip/d.py": "no",
        ".e.py": "no",
    }
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "binary.py").write_bytes(b"\x80\x81")
    config = DataConfig(
        kind="text", path=str(tmp_path), files=["**/*.py", "sub/deep/*.txt"], exclude=["skip", ".*"], split=ALL_TRAIN
    )
    found = records(config)
    texts = {d.file: d.text for d in found if isinstance(d, Document)}
    assert texts == {name: contents[name] for name in ("a.py", "sub/b.py", "sub/deep/c.txt")}
    assert [(r.file, r.reason) for r in found if isinstance(r, Rejection)] == [("binary.py", "not_utf8")]
    single = DataConfig(kind="text", path=str(tmp_path / "a.py"), files=["*"], split=ALL_TRAIN)
    assert [d.file for d in records(single)] == ["a.py"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("**/*.txt", ["a.txt", "x/b.txt", "x/y/b.txt", "x/y/z/c.txt", "xb.txt"]),
        ("x/**/b.txt", ["x/b.txt", "x/y/b.txt"]),
        ("**/y/**/c.txt", ["x/y/z/c.txt"]),
        ("x/*.txt", ["x/b.txt", "x/y/b.txt", "x/y/z/c.txt"]),
        ("x**/b.txt", ["x/b.txt", "x/y/b.txt"]),
    ],
)
def test_patterns_of_files(tmp_path, pattern, names):
    for name in ("a.txt", "x/b.txt", "x/y/b.txt", "x/y/z/c.txt", "xb.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = open_source(DataConfig(kind="text", path=str(tmp_path), files=[pattern])).inputs()
    assert [item.name for item in found] == names


def test_folders_that_are_links_are_read_but_not_in_circles(tmp_path):
    for name in ("raw/train/a.jsonl", "disk2/b.jsonl", "disk2/sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(line(name))
    (tmp_path / "raw" / "train" / "more").symlink_to(tmp_path / "disk2")
    (tmp_path / "disk2" / "sub" / "back").symlink_to(tmp_path / "raw" / "train")
    (tmp_path / "raw" / "here").symlink_to(".")
    found = [item.name for item in open_source(jsonl_config(tmp_path / "raw")).inputs()]
    assert found == ["train/a.jsonl", "train/more/b.jsonl", "train/more/sub/c.jsonl"]
    (tmp_path / "raw" / "train" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    items = open_source(jsonl_config(tmp_path / "raw")).inputs()
    assert [item.name for item in items if item.lost] == ["train/gone.jsonl"] and len(items) == 4


def test_parquet_rows_with_labels_and_a_truncated_file(tmp_path):
    rows = {
        "text": ["a", None, "c"],
        "meta": [{"redpajama_set_name": "X"}, {"redpajama_set_name": "Y"}, None],
        "id": [1, 2, 3],
    }
    pa.parquet.write_table(pa.table(rows), tmp_path / "train-00000.parquet")
    pa.parquet.write_table(pa.table({"text": ["v"]}), tmp_path / "validation-00000.parquet")
    config = DataConfig(
        kind="parquet",
        path=str(tmp_path),
        files=["*.parquet"],
        source_field="meta.redpajama_set_name",
        split=SplitConfig(rule="given"),
    )
    first, second, third, last = records(config)
    assert (first.text, first.source, first.split, first.position) == ("a", "X", "train", 1)
    assert (second.reason, second.position) == ("no_text", 2)
    assert (third.text, third.source, last.split) == ("c", "unknown", "validation")
    data = (tmp_path / "train-00000.parquet").read_bytes()
    (tmp_path / "train-00000.parquet").write_bytes(data[:-9])
    assert [r.reason for r in records(config) if isinstance(r, Rejection)] == ["damaged_archive"]
    with pytest.raises(PrepareError, match=r"no column 'body', only text; set data\.text_field"):
        records(DataConfig(kind="parquet", path=str(tmp_path / "validation-00000.parquet"), text_field="body"))


def test_datasets_stream_local_folders_and_saved_data_sets(tmp_path):
    import datasets

    texts = write_slimpajama(tmp_path / "raw", files=3, documents=10)
    config = DataConfig(
        kind="datasets",
        path=str(tmp_path / "raw"),
        source_field="meta.redpajama_set_name",
        split=SplitConfig(rule="given"),
    )
    found = records(config)
    assert [d.text for d in found if d.split == "train"] == texts
    assert {d.split for d in found} == {"train", "validation", "test"}
    assert {d.source for d in found} == {"RedPajamaC4", "RedPajamaGithub", "RedPajamaBook"}
    assert [item.name for item in open_source(config).inputs()][1] == "train/00000-of-00003"
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    saved = DataConfig(kind="datasets", path=str(tmp_path / "saved"), split=SplitConfig(unit="document"))
    assert [d.text for d in records(saved)] == texts
    manifest, _ = quietly(PrepareConfig(saved, TOKENIZER, str(tmp_path / "out")))
    assert manifest.inputs.documents == len(texts)
    _, log = quietly(PrepareConfig(saved, TOKENIZER, str(tmp_path / "out")))
    assert "already prepared" in log
    (tmp_path / "raw" / "train" / "chunk1" / "example_train_1.jsonl.zst").write_bytes(b"no archive")
    with pytest.raises(PrepareError, match=r"train/0000\d-of-00003: the stream broke after row \d+ \(.*run again"):
        records(config)
    with pytest.raises(PrepareError, match=r"data\.path=.*nothing: the datasets library cannot open it"):
        open_source(DataConfig(kind="datasets", path=str(tmp_path / "nothing")))


@pytest.mark.parametrize("rule", ["given", "hash"])
def test_inputs_of_unknown_size_are_units_of_their_own(tmp_path, rule):
    write_slimpajama(tmp_path / "raw", files=3, documents=10)
    split = SplitConfig(rule=rule, unit="file" if rule == "given" else "document")
    source = open_source(DataConfig(kind="datasets", path=str(tmp_path / "raw"), split=split))
    inputs = source.inputs()
    assert len(inputs) >= 3 and {item.split is None for item in inputs} == {rule == "hash"}
    assert cut_units(source, inputs, 2**30) == [[item] for item in inputs]


@pytest.mark.parametrize("deal", [split_by_name, split_by_text])
def test_splits_by_hash_have_their_shares(deal):
    split = SplitConfig(validation_fraction=0.2, test_fraction=0.1)
    dealt = [deal(f"file{i}", split) for i in range(20_000)]
    assert abs(dealt.count("validation") / 20_000 - 0.2) < 0.01 and abs(dealt.count("test") / 20_000 - 0.1) < 0.01
    assert dealt == [deal(f"file{i}", split) for i in range(20_000)]
    other = SplitConfig(validation_fraction=0.2, test_fraction=0.1, seed=1)
    both = [
        a == b == "validation" for a, b in zip(dealt, [deal(f"file{i}", other) for i in range(20_000)], strict=True)
    ]
    assert abs(sum(both) / 20_000 - 0.04) < 0.01
    assert deal("half a pair \ud83d", split) in ("train", "validation", "test")


def test_equal_documents_go_to_the_same_split(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(line(f"text {i % 50}") for i in range(100)))
    found = records(jsonl_config(tmp_path, split=SplitConfig(unit="document", validation_fraction=0.5)))
    assert [d.split for d in found[:50]] == [d.split for d in found[50:]]
    assert {d.split for d in found} == {"train", "validation"}


def test_paths_and_layouts_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(PrepareError, match=r"no such file or folder; set data\.path"):
        open_source(jsonl_config(tmp_path / "nowhere"))
    with pytest.raises(PrepareError, match=r"no file matches data\.files=\['\*\*/\*\.jsonl\*'\]"):
        open_source(jsonl_config(tmp_path)).inputs()
    (tmp_path / "other.jsonl").write_text(line("x"))
    with pytest.raises(PrepareError, match=r"other\.jsonl: neither a folder nor the file's name says train"):
        open_source(jsonl_config(tmp_path, split=SplitConfig(rule="given"))).inputs()


def test_labels_that_are_no_file_names_get_files_of_their_own(tmp_path):
    (tmp_path / "raw").mkdir()
    labels = ["a/b", "a:b", "a_b", "../x", "ü"]
    lines = "\n".join(line("some text of it", label) for label in labels)
    (tmp_path / "raw" / "a.jsonl").write_text(lines)
    write_slimpajama(tmp_path / "first", files=1)
    quietly(slimpajama_config(tmp_path / "first", tmp_path / "tokenizer"))
    tokenizer = TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer" / "tokenizer"))
    manifest, _ = quietly(PrepareConfig(jsonl_config(tmp_path / "raw"), tokenizer, str(tmp_path / "out")))
    assert sorted(manifest.splits["train"]) == sorted(labels)
    files = {shard.file for shard in manifest.shards}
    assert len(files) == 5 and all((tmp_path / "out" / file).parent.name == "train" for file in files)


@pytest.mark.parametrize("indent", [None, 2], ids=["one line", "many lines"])
def test_a_json_array_is_named_with_its_file_and_place(indent, tmp_path):
    (tmp_path / "raw").mkdir()
    records = [{"text": "one"}, {"text": "two"}]
    (tmp_path / "raw" / "a.jsonl").write_text(json.dumps(records, indent=indent))
    data = DataConfig(kind="jsonl", path=str(tmp_path / "raw"), files=["*.jsonl"])
    with pytest.raises(
        PrepareError, match=r"a\.jsonl, record 1: malformed: a JSON array, where JSON lines have one obj"
    ):
        quietly(PrepareConfig(data, TOKENIZER, str(tmp_path / "out")))
