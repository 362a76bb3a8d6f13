"""Every kind of damage to what is prepared is counted and named by file and place, and nothing of it becomes data."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline.corpus.inspection import verify_corpus
from data_pipeline.errors import PrepareError
from data_pipeline.sources import file_sources
from data_pipeline.sources.archives import CHUNK_BYTES, OversizedLine, read_lines
from data_pipeline.sources.config import DataConfig, SplitConfig, ToleranceConfig
from data_pipeline.sources.source import Document, Rejection
from data_pipeline.sources.sources import open_source
from tests.data_pipeline.small_corpora import quietly, random_text, slimpajama_config, write_slimpajama

TEXTS = [random_text(random.Random(1), 60) for _ in range(400)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
ROWS = pa.table({"text": TEXTS})
UNREADABLE = pa.array([b"fine", b"\xff\xfe", b"fine too"], pa.binary())


def config(path: Path, **changes: object) -> DataConfig:
    settings = {"kind": "records", "files": ["*"], "split": SplitConfig(validation_fraction=0)}
    return DataConfig(path=str(path), **{**settings, **changes})


def read(path: Path, **changes: object) -> tuple[list[str], list[Rejection]]:
    """(texts, rejections) of a folder; the former have to come in the order of the input."""
    source = open_source(config(path, **changes))
    found = [record for item in source.inputs() for record in source.read(item, lambda count: None)]
    return [r.text for r in found if isinstance(r, Document)], [r for r in found if isinstance(r, Rejection)]


def arrow_file() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, ROWS.schema) as writer:
        writer.write_table(ROWS, max_chunksize=50)
    return sink.getvalue().to_pybytes()


def arrow_stream() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, ROWS.schema) as writer:
        writer.write_table(ROWS, max_chunksize=50)
    return sink.getvalue().to_pybytes()


def parquet_file(**options: object) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(ROWS, sink, row_group_size=50, **options)
    return sink.getvalue().to_pybytes()


WHOLE = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "a.jsonl.zst": zstandard.compress(LINES),
    "a.jsonl.zstd": zstandard.ZstdCompressor(write_checksum=True).compress(LINES),
    "a.parquet": parquet_file(),
    "a.arrow": arrow_file(),
    "b.arrow": arrow_stream(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_of_every_kind_are_read_whole(tmp_path, name):
    (tmp_path / name).write_bytes(WHOLE[name])
    source = open_source(config(tmp_path))
    told: list[int] = []
    item = source.inputs()[0]
    found = list(source.read(item, told.append))
    assert [document.text for document in found] == TEXTS
    assert [document.position for document in found] == list(range(1, 401))
    assert sum(told) == item.bytes and min(told) >= 0


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "a.jsonl"])
def test_a_file_that_ends_early_is_named_wherever_it_ends(tmp_path, name):
    data = WHOLE[name]
    for cut in (0, 1, len(data) // 3, len(data) // 2, len(data) - 12, len(data) - 1):
        (tmp_path / name).write_bytes(data[:cut])
        texts, rejections = read(tmp_path)
        assert [(r.file, r.reason) for r in rejections] == [(name, "damaged_archive")], cut
        assert rejections[0].position == len(texts) + 1 and texts == TEXTS[: len(texts)]
        assert rejections[0].whole_file == name.startswith("a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zstd", "checked.parquet"])
def test_a_flipped_bit_in_a_file_with_checksums_is_noticed(tmp_path, name):
    rng = random.Random(2)
    data = WHOLE[name] if name in WHOLE else parquet_file(write_page_checksum=True)
    for _ in range(20):
        damaged = bytearray(data)
        damaged[rng.randrange(100, len(data) * 9 // 10)] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(damaged)
        texts, rejections = read(tmp_path)
        # Parquet's checksums are of the pages; a bit between them may have no effect, but never another text.
        assert rejections and rejections[0].file == name or name == "checked.parquet" and texts == TEXTS
        assert texts == TEXTS[: len(texts)] or rejections[0].whole_file


def test_nothing_of_an_altered_archive_is_written(tmp_path):
    write_slimpajama(tmp_path / "raw", files=3)
    folder = tmp_path / "raw" / "train" / "chunk1"
    altered = bytearray(gzip.compress(LINES, compresslevel=0))
    altered[altered.index(b"qudex", len(altered) * 2 // 3)] ^= 1
    (folder / "altered.jsonl.gz").write_bytes(altered)
    settings = slimpajama_config(tmp_path / "raw", tmp_path / "out", unit_bytes=10**9, shard_bytes=1000)
    data = replace(settings.data, files=["**/*.jsonl.*"], tolerance=ToleranceConfig(0.9, damaged_files=1))
    manifest, _ = quietly(replace(settings, data=data))
    assert manifest.inputs.documents == 5 * 30
    assert manifest.inputs.rejected == {"damaged_archive": manifest.inputs.records - 5 * 30}
    report = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert report[-1]["file"] == "train/chunk1/altered.jsonl.gz" and report[-1]["position"] > 200
    assert "nothing of the file is used" in report[-1]["detail"]
    assert verify_corpus(tmp_path / "out") == []


def test_what_follows_a_frame_is_damage_unless_it_is_a_frame(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINES) + b"garbage")
    texts, rejections = read(tmp_path)
    assert texts == TEXTS and rejections[0].reason == "damaged_archive" and rejections[0].position == 401


RECORDS = {
    "malformed": [
        b'{"text": "torn',
        b"[1, 2]",
        b'"just a string"',
        b"12",
        b"null",
        b'{"text": "a"} {"text": "b"}',
        b"\xfe",
    ],
    "no_text": [b'{"body": "x"}', b'{"text": null}', b'{"text": 5}', b'{"text": ["x"]}', b'{"text": {"x": 1}}', b"{}"],
    "not_utf8": [b'{"text": "\xff"}', b'{"text": "\xc3"}', b'{"text": "ok", "x": "\xe2\x82"}'],
    "empty": [b"", b"   ", b"\t"],
    "too_large": [b'{"text": "' + b"x" * 3000 + b'"}', b"y" * 2001],
}


@pytest.mark.parametrize("reason", RECORDS)
def test_records_that_give_no_document(tmp_path, reason):
    good = json.dumps({"text": "good"}).encode()
    lines = [line for bad in RECORDS[reason] for line in (bad, good)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    texts, rejections = read(tmp_path, max_record_bytes=2000)
    assert texts == ["good"] * len(RECORDS[reason])
    expected = "malformed" if reason == "malformed" else reason
    found = [(r.reason, r.position) for r in rejections if r.position != 13 or reason != "malformed"]
    assert found == [
        (expected, position) for position in range(1, len(lines), 2) if position != 13 or reason != "malformed"
    ]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "half \\ud83d"}', "half \ud83d"),
        (b'{"text": "x", "score": NaN, "big": ' + b"9" * 5000 + b"}", "x"),
        (b'{"text": "x", "deep": ' + b"[" * 900 + b"]" * 900 + b"}", "x"),
        (b'{"text": "first", "text": "last"}', "last"),
        (b'\t {"text": "\\u0000\\/\\n"} \r', "\0/\n"),
    ],
)
def test_unusual_json_means_the_same_with_both_parsers(tmp_path, monkeypatch, line, text):
    (tmp_path / "a.jsonl").write_bytes(line)
    with_any = read(tmp_path)
    monkeypatch.setattr(file_sources, "parse_json_fast", file_sources._parse_json)
    assert read(tmp_path) == with_any == ([text], [])


def test_the_fast_parser_rejects_what_the_standard_library_rejects(tmp_path, monkeypatch):
    pytest.importorskip("msgspec")
    lines = [line for lines in RECORDS.values() for line in lines] + [
        b"[" * 5000,
        b'{"text": "\x01"}',
        b"\xef\xbb\xbf{}",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with_msgspec = read(tmp_path)
    monkeypatch.setattr(file_sources, "parse_json_fast", file_sources._parse_json)
    assert read(tmp_path) == with_msgspec


def test_a_line_is_never_held_beyond_the_limit(tmp_path):
    long = b"x" * (3 * CHUNK_BYTES)
    (tmp_path / "a").write_bytes(b"\n".join([b"a", long, b"", b"b" * 100, b"c" * 101, long]))
    found = list(read_lines(tmp_path / "a", 100, 1 << 20, lambda count: None))
    sizes = [line.bytes if isinstance(line, OversizedLine) else bytes(line) for line in found]
    assert sizes == [b"a", len(long), b"", b"b" * 100, 101, len(long)]
    whole = [bytes(line) for line in read_lines(tmp_path / "a", len(long), 1 << 20, lambda count: None)]
    assert whole == [b"a", long, b"", b"b" * 100, b"c" * 101, long]


def test_text_of_columns_that_is_not_utf8_costs_its_row_only(tmp_path):
    table = pa.Table.from_arrays([UNREADABLE.view(pa.string())], ["text"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    texts, rejections = read(tmp_path)
    assert texts == ["fine", "fine too"] * 2
    assert [(r.file, r.position, r.reason) for r in rejections] == [
        ("a.parquet", 2, "not_utf8"),
        ("b.arrow", 2, "not_utf8"),
    ]


def test_a_column_name_that_is_not_utf8_is_damage(tmp_path):
    (tmp_path / "a.arrow").write_bytes(arrow_stream().replace(b"text\0", b"te\xfft\0"))
    texts, rejections = read(tmp_path)
    assert texts == [] and [r.reason for r in rejections] == ["damaged_archive"]


@pytest.mark.parametrize(
    ("values", "kind"), [([b"text", b"x"], "of type bytes"), ([1.5, None], "a number"), ([[1], [2]], "a list")]
)
def test_a_column_that_holds_no_text_is_named_by_its_type(tmp_path, values, kind):
    pa.parquet.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    assert read(tmp_path)[1][0].detail == f"field 'text': it is {kind}"


def test_offsets_of_an_arrow_file_that_point_outside_are_refused(tmp_path):
    data = bytearray(arrow_stream())
    place = data.find(TEXTS[0].encode())
    offsets = data.rfind(bytes(4) + len(TEXTS[0].encode()).to_bytes(4, "little"), 0, place)
    data[offsets + 6] ^= 0x7F
    (tmp_path / "a.arrow").write_bytes(data)
    texts, rejections = read(tmp_path)
    assert texts == [] and [r.reason for r in rejections] == ["damaged_archive"]


def test_large_and_binary_files_of_a_text_tree(tmp_path):
    (tmp_path / "large.txt").write_bytes(b"x" * 101)
    (tmp_path / "binary.txt").write_bytes(b"\x80")
    (tmp_path / "fits.txt").write_bytes(b"x" * 100)
    texts, rejections = read(tmp_path, kind="text", max_record_bytes=100)
    assert texts == ["x" * 100]
    assert [(r.file, r.reason) for r in rejections] == [("binary.txt", "not_utf8"), ("large.txt", "too_large")]
    assert "101 bytes, data.max_record_bytes is 100" in rejections[1].detail


def test_dclm_is_read_as_it_is_laid_out(tmp_path):
    from conf import compose
    from data_pipeline.preparing.config import PrepareConfig, resolve_source

    folder = tmp_path / "global-shard_01_of_10" / "local-shard_0_of_10"
    folder.mkdir(parents=True)
    records = [{"text": f"page {i}", "url": "u", "metadata": {"a": i} if i % 2 else {"b": "x"}} for i in range(20)]
    data = zstandard.compress("\n".join(map(json.dumps, records)).encode())
    for name in (
        "shard_00000000_processed.jsonl.zstd",
        "shard_00000010_processed.jsonl.zstd",
        "shard_1_old.jsonl.zstd",
    ):
        (folder / name).write_bytes(data)
    settings = resolve_source(compose(PrepareConfig, "prepare", ["data=dclm", f"source={tmp_path}", "output=x"]))
    source = open_source(settings.data)
    assert len(source.inputs()) == 2
    found = [r for item in source.inputs() for r in source.read(item, lambda count: None)]
    assert [r.text for r in found] == [f"page {i}" for i in range(20)] * 2 and {r.source for r in found} == {"dclm"}


def test_the_tolerance_is_looked_at_while_it_runs(tmp_path, monkeypatch):
    write_slimpajama(tmp_path / "raw", files=6, documents=20)
    path = tmp_path / "raw" / "train" / "chunk1" / "example_train_0.jsonl.zst"
    path.write_bytes(zstandard.compress(b"not JSON\n" * 30 + LINES))
    settings = slimpajama_config(tmp_path / "raw", tmp_path / "out")
    tolerance = ToleranceConfig(rejected_fraction=0.05)
    settings = replace(settings, data=replace(settings.data, tolerance=tolerance))
    monkeypatch.setattr("data_pipeline.preparing.workers.TOLERANCE_RECORDS", 100)
    with pytest.raises(PrepareError, match=r"30 of 4\d\d records \(.*30 x malformed.*allows 5\.000%") as error:
        quietly(settings)
    assert "example_train_0.jsonl.zst, record 1: malformed" in str(error.value)
    assert len(list((tmp_path / "out" / "preparing" / "units").iterdir())) < 8
    tolerance = ToleranceConfig(rejected_fraction=0.08)
    manifest, _ = quietly(replace(settings, data=replace(settings.data, tolerance=tolerance)))
    assert manifest.inputs.rejected == {"malformed": 30} and manifest.inputs.documents == 400 + 7 * 20
