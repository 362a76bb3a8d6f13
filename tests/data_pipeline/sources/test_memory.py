"""Small files that expand to gigabytes: memory stays within the configuration, and what exceeds it is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from tests.runs import PATIENCE, ROOT, environment

MIB = 1 << 20
RECORD_BYTES = 4 * MIB
READER_BYTES = 32 * MIB
# What reading may take: of the reader, of a record as a line, a text of the widest characters and in UTF-8, and of
# what Python and Arrow load meanwhile.
ALLOWED_MIB = (READER_BYTES + 6 * RECORD_BYTES) // MIB + 40
GOOD = json.dumps({"text": "good"}).encode() + b"\n"
LARGE = "x" * MIB
TOO_LARGE = "x" * (16 * MIB)

# The peak is that of this program: the one that `getrusage` tells begins with that of the process that started it.
READER = """
import json, sys
from pathlib import Path
import pyarrow.parquet
from data_pipeline.sources.config import DataConfig, SplitConfig
from data_pipeline.sources.source import Document
from data_pipeline.sources.sources import open_source

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM")) // 1024

before = peak()
source = open_source(DataConfig(split=SplitConfig(validation_fraction=0), **json.loads(sys.argv[1])))
inputs = source.inputs()
lengths, labels, rejections = [], [], []
hint = source.why_unlabelled(inputs)
for item in inputs:
    for record in source.read(item, lambda count: None):
        if isinstance(record, Document):
            lengths.append(len(record.text))
            labels.append(record.source)
        elif len(rejections) < 10:
            rejections.append([record.file, record.position, record.reason, record.detail])
print(json.dumps([peak() - before, lengths, labels, rejections, hint]))
"""


@dataclass(frozen=True)
class Reading:
    """What a process of its own read: texts by their lengths, and the memory that it took for it."""

    mib: int
    lengths: list[int]
    labels: list[str]
    rejections: list[tuple[str, int, str, str]]
    hint: str | None


def read(folder: Path, **changes: object) -> Reading:
    settings = {"kind": "records", "path": str(folder), "files": ["*"]}
    settings |= {"max_record_bytes": RECORD_BYTES, "max_reader_bytes": READER_BYTES}
    command = [sys.executable, "-c", READER, json.dumps({**settings, **changes})]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert result.returncode == 0, result.stderr
    mib, lengths, labels, rejections, hint = json.loads(result.stdout)
    return Reading(mib, lengths, labels, [tuple(rejection) for rejection in rejections], hint)


def compressed(new: Callable[[], object], *parts: tuple[bytes, int]) -> bytes:
    """(data, how often it is repeated) in one frame."""
    compressor = new()
    return b"".join([compressor.compress(data) for data, count in parts for _ in range(count)] + [compressor.flush()])


def zstd(**parameters: int) -> Callable[[], object]:
    chosen = zstandard.ZstdCompressionParameters(compression_level=1, **parameters)
    return lambda: zstandard.ZstdCompressor(compression_params=chosen).compressobj()


def gzipped() -> object:
    return zlib.compressobj(6, wbits=31)


@pytest.mark.parametrize(("ending", "new", "mib"), [("zst", zstd(), 2048), ("gz", gzipped, 100)])
def test_an_archive_of_one_endless_line(tmp_path, ending, new, mib):
    data = compressed(new, (GOOD, 1), (bytes(MIB), mib), (b"\n" + GOOD, 1))
    assert len(data) < mib * MIB // 200
    (tmp_path / f"a.jsonl.{ending}").write_bytes(data)
    reading = read(tmp_path)
    assert reading.mib < ALLOWED_MIB and reading.lengths == [4, 4]
    size = f"a line of {mib * MIB} bytes, data.max_record_bytes is {RECORD_BYTES}"
    assert reading.rejections == [(f"a.jsonl.{ending}", 2, "too_large", size)]


def test_an_archive_of_many_lines(tmp_path):
    lines = (b" " * (MIB - 1) + b"\n", 80), (GOOD, 1)
    (tmp_path / "a.jsonl.zst").write_bytes(compressed(zstd(), *lines))
    (tmp_path / "b.jsonl.gz").write_bytes(compressed(gzipped, *lines))
    reading = read(tmp_path)
    assert reading.mib < ALLOWED_MIB and reading.lengths == [4, 4]
    assert reading.rejections[9] == ("a.jsonl.zst", 10, "empty", "a blank line")


def test_a_zstd_file_of_many_small_frames(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b"x") * 300_000 + zstandard.compress(b"\n" + GOOD))
    reading = read(tmp_path)
    assert reading.mib < ALLOWED_MIB // 2 and reading.lengths == [4]
    assert [rejection[1:3] for rejection in reading.rejections] == [(1, "malformed")]


def test_a_zstd_frame_with_a_large_window(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(compressed(zstd(window_log=28), (bytes(MIB), 300), (b"\n" + GOOD, 1)))
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    reading = read(tmp_path)
    assert reading.mib < ALLOWED_MIB and reading.lengths == [4]
    detail = f"the window of a zstd frame takes {2**28} bytes of memory, data.max_reader_bytes is {READER_BYTES}"
    assert reading.rejections == [("a.jsonl.zst", 1, "memory_limit", f"{detail}; nothing of the file is used")]
    assert read(tmp_path, max_reader_bytes=2**28).rejections[0][2] == "too_large"


def test_a_plain_file_of_one_endless_line(tmp_path):
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.truncate(512 * MIB)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + GOOD)
    reading = read(tmp_path)
    assert reading.mib < ALLOWED_MIB and reading.lengths == [4]
    assert reading.rejections[0][:3] == ("a.jsonl", 1, "too_large")


def test_a_text_that_is_larger_than_memory(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "b.txt").write_text("good")
    reading = read(tmp_path, kind="text", max_reader_bytes=2**30)
    assert reading.mib < ALLOWED_MIB and reading.lengths == [4]
    size = f"{1 << 40} bytes, data.max_record_bytes is {RECORD_BYTES}"
    assert reading.rejections == [("a.txt", 0, "too_large", size)]


def test_json_records_of_many_fields(tmp_path):
    fields = [b"[[[[[[[[]]]]]]]],", b'{"a":0},', b"[],", b'"ab",', b"0.5,"]
    lines = [b'{"text": "x", "a": [' + field * (8 * MIB // len(field)) + b"0]}\n" for field in fields]
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b"".join([*lines, GOOD])))
    reading = read(tmp_path, max_record_bytes=12 * MIB)
    # Lines are held, and a part of them as it is looked at.
    assert reading.mib < ALLOWED_MIB and reading.lengths == [4]
    assert [rejection[:3] for rejection in reading.rejections] == [("a.jsonl.zst", n, "too_large") for n in range(1, 6)]
    for *_, detail in reading.rejections:
        assert detail.startswith("its fields take ") and detail.endswith(f"data.max_reader_bytes is {READER_BYTES}")


def test_what_is_text_in_a_json_record_counts_as_no_fields(tmp_path):
    text = '[{"a": "\\", [[[{"}],' * (RECORD_BYTES // 40)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    reading = read(tmp_path)
    assert reading.lengths == [len(text)] and not reading.rejections


def test_json_that_is_nested_deeply(tmp_path):
    lines = [GOOD, b"[" * 200_000 + b"\n", b'{"a":' * 90_000 + b"\n", GOOD]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    reading = read(tmp_path)
    assert reading.mib < ALLOWED_MIB and reading.lengths == [4, 4]
    assert reading.rejections == [("a.jsonl", n, "malformed", "not JSON: nested too deeply") for n in (2, 3)]


def write_parquet(path: Path, *row_groups: pa.Table, **options: object) -> None:
    options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False, **options}
    with pa.parquet.ParquetWriter(path, row_groups[0].schema, **options) as writer:
        for table in row_groups:
            writer.write_table(table)


def repeated(value: str, count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))


def test_a_value_that_many_rows_of_parquet_have(tmp_path):
    tables = [pa.table({"text": repeated(text, 128)}) for text in (LARGE, TOO_LARGE, "good")]
    for name, version in (("a", "1.0"), ("b", "2.0")):
        write_parquet(tmp_path / f"{name}.parquet", *tables, data_page_version=version)
        assert (tmp_path / f"{name}.parquet").stat().st_size < 3000
    reading = read(tmp_path)
    assert reading.mib < ALLOWED_MIB and reading.lengths == [*[len(LARGE)] * 128, *[4] * 128] * 2
    assert [rejection[:3] for rejection in reading.rejections] == [
        ("a.parquet", 129, "memory_limit"),
        ("b.parquet", 129, "memory_limit"),
    ]
    for *_, detail in reading.rejections:
        assert detail.startswith("row group 1 takes ")
        assert detail.endswith(f" bytes of memory, data.max_reader_bytes is {READER_BYTES}; its 128 rows are lost")


def test_values_that_go_on_with_the_one_before(tmp_path):
    table = pa.table({"text": [LARGE] * 100})
    encoding = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    write_parquet(tmp_path / "a.parquet", table, **encoding)
    reading = read(tmp_path)
    assert (tmp_path / "a.parquet").stat().st_size < 3000
    assert reading.mib < ALLOWED_MIB and reading.lengths == [len(LARGE)] * 100


def giant_string() -> pa.Array:
    return pa.array(["x" * (64 * MIB)], pa.large_string())


def list_of_many() -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, 1 << 24], pa.int32()), pa.nulls(1 << 24, pa.int8()))


def nulls_of_one_length() -> pa.Array:
    return pa.array([None], pa.binary(1 << 29))


def test_rows_of_parquet_that_are_too_large(tmp_path):
    for number, column in enumerate((giant_string(), list_of_many(), nulls_of_one_length())):
        write_parquet(tmp_path / f"{number}.parquet", pa.table({"text": column}), use_dictionary=False)
    write_parquet(tmp_path / "9.parquet", pa.table({"text": ["good"]}))
    reading = read(tmp_path)
    assert reading.mib < ALLOWED_MIB and reading.lengths == [4]
    assert [rejection[:3] for rejection in reading.rejections] == [
        (f"{number}.parquet", 1, "memory_limit") for number in range(3)
    ]


def test_a_parquet_footer_that_lies_about_sizes(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, pa.table({"text": repeated(TOO_LARGE, 256)}), pa.table({"text": repeated("good", 1)}))

    def size() -> int:
        return pa.parquet.read_metadata(path).row_group(0).column(0).total_uncompressed_size

    data, told = path.read_bytes(), varint(size())
    smaller = varint(1 << 21)
    assert data.count(told) >= 1 and len(told) == len(smaller)
    path.write_bytes(data.replace(told, smaller))
    assert size() == 1 << 21
    reading = read(tmp_path)
    assert reading.mib < ALLOWED_MIB and reading.lengths == [4]
    assert [rejection[:3] for rejection in reading.rejections] == [("a.parquet", 1, "memory_limit")]


def varint(number: int) -> bytes:
    """As Thrift's compact protocol writes a number of at least 0."""
    number *= 2
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def test_labels_beside_lists_are_found_and_the_lists_left(tmp_path):
    tags = pa.ListArray.from_arrays(pa.array([0, 1 << 24], pa.int32()), repeated(LARGE, 1 << 24))
    meta = pa.StructArray.from_arrays([pa.array(["wiki"]), tags], ["set", "tags"])
    write_parquet(tmp_path / "a.parquet", pa.table({"text": ["good"], "meta": meta, "tags": tags}))
    reading = read(tmp_path, source_field="meta.set")
    assert reading.mib < ALLOWED_MIB and reading.labels == ["wiki"] and not reading.rejections
    hint = read(tmp_path, source_field="other").hint
    assert hint == "no text in data.source_field=other; its fields are: text, meta.set, tags"


def test_a_label_in_json_that_expands(tmp_path):
    meta = ['{"set": "wiki", "a": [' + "[],[]," * (2 * MIB) + "0]}", '{"set": "wiki"}']
    write_parquet(tmp_path / "a.parquet", pa.table({"text": ["good", "good"], "meta": meta}))
    reading = read(tmp_path, source_field="meta.set", max_reader_bytes=64 * MIB)
    assert reading.mib < ALLOWED_MIB + 32 and reading.labels == ["unknown", "wiki"]


def write_arrow(path: Path, new: Callable, *tables: pa.Table, compression: str | None = None) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, new(sink, tables[0].schema, options=options) as writer:
        for table in tables:
            writer.write_table(table)


NEW = {"file.arrow": pa.ipc.new_file, "stream.arrow": pa.ipc.new_stream}


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compressed_batch_of_arrow(tmp_path, compression):
    giant, good = pa.table({"text": giant_string()}), pa.table({"text": pa.array(["good"] * 300, pa.large_string())})
    for name, new in NEW.items():
        write_arrow(tmp_path / name, new, good, giant, good, compression=compression)
    reading = read(tmp_path)
    assert reading.mib < ALLOWED_MIB and reading.lengths == [4] * 1200
    assert [rejection[:3] for rejection in reading.rejections] == [(name, 301, "memory_limit") for name in NEW]
    for *_, detail in reading.rejections:
        assert detail.startswith("record batch 1 takes 6710888")
        assert detail.endswith(f" bytes of memory, data.max_reader_bytes is {READER_BYTES}; its 1 rows are lost")


def test_a_dictionary_of_arrow_that_expands(tmp_path):
    giant, large = (pa.table({"text": repeated(text, 150)}) for text in ("x" * (64 * MIB), LARGE))
    for name, new in NEW.items():
        write_arrow(tmp_path / name, new, giant, compression="zstd")
        write_arrow(tmp_path / f"{name}.2.arrow", new, large, compression="zstd")
    reading = read(tmp_path)
    assert reading.mib < ALLOWED_MIB and reading.lengths == [len(LARGE)] * 300
    assert [rejection[:3] for rejection in reading.rejections] == [(name, 1, "memory_limit") for name in NEW]
    for *_, detail in reading.rejections:
        assert detail.startswith("its dictionaries take") and detail.endswith("; what follows is lost")


def runs() -> pa.Array:
    return pa.RunEndEncodedArray.from_arrays(pa.array([150], pa.int32()), pa.array([LARGE]))


def views() -> pa.Array:
    one = pa.array([LARGE], pa.string_view())
    return pa.Array.from_buffers(
        pa.string_view(), 150, [None, pa.py_buffer(one.buffers()[1].to_pybytes() * 150), one.buffers()[2]]
    )


def test_a_value_that_many_rows_of_arrow_have(tmp_path):
    for name, column in (("runs", runs()), ("views", views())):
        write_arrow(tmp_path / f"{name}.arrow", pa.ipc.new_file, pa.table({"text": column}))
    reading = read(tmp_path)
    assert reading.mib < ALLOWED_MIB and reading.lengths == [len(LARGE)] * 300 and not reading.rejections


def test_a_list_of_arrow_that_takes_no_bytes(tmp_path):
    text = pa.ListArray.from_arrays(pa.array([0, 1 << 27], pa.int32()), pa.nulls(1 << 27))
    write_arrow(tmp_path / "a.arrow", pa.ipc.new_file, pa.table({"text": text}))
    reading = read(tmp_path)
    assert reading.mib < ALLOWED_MIB
    assert reading.rejections == [("a.arrow", 1, "no_text", "field 'text': it is a list")]


def test_a_text_of_arrow_above_the_limit_is_counted_in_characters(tmp_path):
    texts = ["é" * RECORD_BYTES, "é" * (RECORD_BYTES + 1), "x" * (200 * MIB)]
    write_arrow(tmp_path / "a.arrow", pa.ipc.new_file, pa.table({"text": texts}))
    reading = read(tmp_path)
    # The file is mapped, and its pages count.
    assert reading.mib < ALLOWED_MIB + 220 and reading.lengths == [RECORD_BYTES]
    assert [(position, detail.split(",")[0]) for _, position, _, detail in reading.rejections] == [
        (2, f"{RECORD_BYTES + 1} characters"),
        (3, f"{200 * MIB} characters"),
    ]
