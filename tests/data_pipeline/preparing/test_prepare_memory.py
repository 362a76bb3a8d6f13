"""A preparation and a run of live text meet files that expand to gigabytes: counted, named, and within memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline.corpus.inspection import verify_corpus
from data_pipeline.errors import CorpusError, PrepareError
from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.reading.live import LiveCorpus, LiveStream
from data_pipeline.sources.config import MAX_READER_BYTES, DataConfig, SplitConfig, ToleranceConfig
from data_pipeline.tokenizing.config import TokenizerConfig
from tests.data_pipeline.small_corpora import TOKENIZER, quietly, sample_texts
from tests.runs import PATIENCE, ROOT, environment

MIB = 1 << 20
# The command, and at its end the most memory that it has taken since its imports, in MiB.
COMMAND = """
import sys
from pathlib import Path
import datasets, sentencepiece, tokenizers
import data_pipeline.preparing.prepare
from data_pipeline.__main__ import main

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM")) // 1024

before = peak()
code = main(sys.argv[1:])
print(peak() - before)
sys.exit(code)
"""


def write_good(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"text": text, "meta": {"set": "wiki"}}) + "\n" for text in sample_texts())
    (folder / "good.jsonl").write_text(lines)


def write_parquet_bomb(path: Path, length: int = 16 * MIB) -> None:
    """Rows that all have one long text."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), pa.array(["x" * length]))
    options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    pa.parquet.write_table(pa.table({"text": texts}), path, **options)


def test_a_preparation_that_meets_bombs(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_good(raw)
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    line = b"".join([*(compressor.compress(bytes(MIB)) for _ in range(3072)), compressor.flush()])
    (raw / "bomb.jsonl.zst").write_bytes(line)
    write_parquet_bomb(raw / "bomb.parquet")
    assert len(line) < 300_000 and (raw / "bomb.parquet").stat().st_size < 2000
    settings = ["data=records", f"source={raw}", f"output={out}", "data.source_field=meta.set"]
    settings += [f"data.max_record_bytes={4 * MIB}", f"data.max_reader_bytes={32 * MIB}"]
    settings += ["tokenizer.vocab_size=400", "tokenizer.sample_bytes=200000", "tokenizer.backend=reference"]
    settings += ["data.tolerance.rejected_fraction=0.1", "data.tolerance.damaged_files=1"]
    command = [sys.executable, "-c", COMMAND, "prepare", *settings]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert result.returncode == 0, result.stderr
    *_, peak = result.stdout.split()
    assert int(peak) < 300
    assert "rejected memory_limit: 1" in result.stdout and "rejected too_large: 1" in result.stdout
    report = {(line["file"], line["reason"]): line for line in map(json.loads, (out / "report.jsonl").open())}
    assert report["bomb.jsonl.zst", "too_large"]["position"] == 1
    assert report["bomb.jsonl.zst", "too_large"]["detail"] == (
        f"a line of {3072 * MIB} bytes, data.max_record_bytes is {4 * MIB}"
    )
    assert report["bomb.parquet", "memory_limit"]["position"] == 1
    assert "its 256 rows are lost" in report["bomb.parquet", "memory_limit"]["detail"]
    assert verify_corpus(out) == []


def config(folder: Path, **changes: object) -> PrepareConfig:
    split = SplitConfig(validation_fraction=0)
    data = DataConfig("records", str(folder / "raw"), ["*"], split=split, max_reader_bytes=32 * MIB)
    return PrepareConfig(replace(data, **changes), TOKENIZER, str(folder / "out"))


def test_a_file_beyond_the_memory_of_a_reader_is_a_damaged_one(tmp_path):
    write_good(tmp_path / "raw")
    write_parquet_bomb(tmp_path / "raw" / "bomb.parquet")
    with pytest.raises(PrepareError) as error:
        quietly(config(tmp_path))
    assert "1 damaged files, data.tolerance.damaged_files allows 0" in str(error.value)
    assert "bomb.parquet, record 1: memory_limit: row group 0 takes " in str(error.value)
    assert f"data.max_reader_bytes is {32 * MIB}; its 256 rows are lost" in str(error.value)
    tolerance = ToleranceConfig(rejected_fraction=0.1, damaged_files=1)
    manifest, _ = quietly(config(tmp_path, tolerance=tolerance))
    assert manifest.inputs.rejected == {"memory_limit": 1}
    assert manifest.inputs.documents == len(sample_texts())


def test_the_limit_is_a_setting_of_the_corpus_unless_it_is_the_default(tmp_path):
    write_good(tmp_path / "raw")
    manifest, _ = quietly(config(tmp_path, max_reader_bytes=MAX_READER_BYTES))
    # As in corpora that were prepared before there was the key.
    assert "max_reader_bytes" not in manifest.settings["data"]
    with pytest.raises(PrepareError, match=f"data.max_reader_bytes: None there, {32 * MIB} now"):
        quietly(config(tmp_path))
    other = replace(config(tmp_path), output=str(tmp_path / "other"))
    assert quietly(other)[0].settings["data"]["max_reader_bytes"] == 32 * MIB


def test_live_text_beyond_the_memory_of_a_reader_is_refused(tmp_path, sentencepiece_file):
    write_good(tmp_path / "raw")
    write_parquet_bomb(tmp_path / "raw" / "bomb.parquet")
    tokenizer = TokenizerConfig(kind="file", path=str(sentencepiece_file), backend="reference")

    def stream(**changes: object) -> LiveStream:
        return LiveStream(LiveCorpus(config(tmp_path, **changes).data, tokenizer, "train"), 64, 0, 2, 1)

    with pytest.raises(CorpusError, match=r"bomb.parquet, record 1: memory_limit: row group 0 takes \d+ bytes of me"):
        for sample in range(0, 10_000, 2):
            stream().batch(sample, 2)
    stream(tolerance=ToleranceConfig(rejected_fraction=0.1, damaged_files=1)).batch(0, 2)
    default = stream(max_reader_bytes=MAX_READER_BYTES)
    assert MAX_READER_BYTES not in default.corpus.identity and 32 * MIB in stream().corpus.identity
