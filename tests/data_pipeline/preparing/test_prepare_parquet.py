"""Large Parquet files, whose row groups are dealt to units: the same accounts and bytes, whoever reads which."""

from __future__ import annotations

import json
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.inspection import verify_corpus
from data_pipeline.errors import PrepareError
from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.preparing.units import cut_units
from data_pipeline.preparing.workers import WorkFolder
from data_pipeline.sources.columns import cut_row_groups
from data_pipeline.sources.config import DataConfig, SplitConfig, ToleranceConfig
from data_pipeline.sources.source import InputFile
from data_pipeline.sources.sources import open_source
from tests.data_pipeline.commands import contents, finish, never_finished, start
from tests.data_pipeline.small_corpora import LABELS, TOKENIZER, quietly, random_text

ROWS, ROWS_IN_A_GROUP = 330, 30


def write_parquet(path: Path, seed: int = 0, **options: object) -> list[str | None]:
    """A file of 11 row groups, in which every 50th row has no text; returns the texts."""
    rng = random.Random(seed)
    texts = [None if row % 50 == 49 else random_text(rng, 60) for row in range(ROWS)]
    meta = [{"redpajama_set_name": rng.choice(LABELS)} for _ in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table({"text": texts, "meta": meta}), path, row_group_size=ROWS_IN_A_GROUP, **options)
    return texts


def config(raw: Path, output: Path, **changes: object) -> PrepareConfig:
    data = DataConfig(
        kind="records",
        path=str(raw),
        files=["**/*.parquet"],
        exclude=[".*"],
        source_field="meta.redpajama_set_name",
        split=SplitConfig(rule="given"),
        tolerance=ToleranceConfig(rejected_fraction=0.05),
    )
    settings = {"data": data, "tokenizer": TOKENIZER, "output": str(output), "shard_bytes": 4000, "unit_bytes": 10_000}
    return PrepareConfig(**{**settings, **changes})


def input_lines(corpus: Path) -> list[dict]:
    return [json.loads(line) for line in (corpus / "inputs.jsonl").read_text().splitlines()]


def test_runs_of_row_groups_cover_a_file_once_and_only_large_files_are_cut(tmp_path):
    write_parquet(tmp_path / "train" / "a.parquet")
    write_parquet(tmp_path / "train" / "b.parquet")
    size = (tmp_path / "train" / "a.parquet").stat().st_size
    source = open_source(config(tmp_path, tmp_path / "out").data)
    inputs = source.inputs()
    assert [[item.part for item in unit] for unit in cut_units(source, inputs, size)] == [[None], [None]]
    for part_bytes in (1, 10_000, size - 1):
        runs = cut_row_groups(tmp_path / "train" / "a.parquet", part_bytes)
        assert (runs[0].first, runs[0].start_byte, runs[-1].end, runs[-1].end_byte) == (0, 0, 11, size)
        assert all((a.end, a.end_byte) == (b.first, b.start_byte) for a, b in zip(runs, runs[1:], strict=False))
        assert all(run.bytes >= part_bytes for run in runs[:-1])
        parts = [part for unit in cut_units(source, inputs, part_bytes) for part in unit]
        assert [part.part for part in parts[: len(runs)]] == runs and {part.bytes for part in parts} == {size}
        read = [record for part in parts for record in source.read(part, lambda count: None)]
        assert read == [record for item in inputs for record in source.read(item, lambda count: None)]


@pytest.mark.slow
def test_one_file_is_shared_by_workers_and_survives_kills_with_the_same_bytes(tmp_path):
    texts = write_parquet(tmp_path / "raw" / "train" / "a.parquet")
    settings = config(tmp_path / "raw", tmp_path / "one", unit_bytes=1)
    manifest, _ = quietly(settings)
    assert (manifest.inputs.files, manifest.inputs.records, manifest.inputs.rejected) == (1, ROWS, {"no_text": 6})
    assert verify_corpus(tmp_path / "one") == []
    lines = input_lines(tmp_path / "one")
    assert [line["row_groups"] for line in lines] == [[group, group + 1] for group in range(11)]
    assert all(line["records"] == line["documents"] + sum(line["rejected"].values()) for line in lines)
    report = [json.loads(line) for line in (tmp_path / "one" / "report.jsonl").read_text().splitlines()]
    assert [line["position"] for line in report] == [50, 100, 150, 200, 250, 300]
    corpus = Corpus.open(tmp_path / "one")
    decoded = sum(source["documents"] for source in corpus.manifest.splits["train"].values())
    assert decoded == len([text for text in texts if text is not None])
    more = ["data.files=[**/*.parquet]", "data.tolerance.rejected_fraction=0.05"]
    out = tmp_path / "killed"
    with never_finished(out, unit=10):
        process = start(tmp_path / "raw", out, "workers=1", *more)
        while process.poll() is None and len(WorkFolder(out).finished()) < 2:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
    finish(start(tmp_path / "raw", out, "workers=2", *more))
    assert contents(out) == contents(tmp_path / "one")


def test_damage_costs_the_rest_of_a_run_of_row_groups_and_is_one_damaged_file(tmp_path):
    path = tmp_path / "raw" / "train" / "a.parquet"
    write_parquet(path, write_page_checksum=True)
    write_parquet(tmp_path / "raw" / "train" / "whole.parquet", seed=1)
    settings = config(tmp_path / "raw", tmp_path / "out")
    runs = cut_row_groups(path, settings.unit_bytes)
    data = bytearray(path.read_bytes())
    for run in (runs[1], runs[3]):
        data[run.start_byte + 500] ^= 1
    path.write_bytes(data)
    place = rf"train/a\.parquet, record {runs[1].first * ROWS_IN_A_GROUP + 1}"
    lost = rf"{place}: damaged_archive: .* in row groups 2 to 3 is lost"
    with pytest.raises(PrepareError, match=rf"1 damaged files, (?s:.*){lost}"):
        quietly(settings)
    tolerance = ToleranceConfig(rejected_fraction=0.05, damaged_files=1)
    manifest, _ = quietly(replace(settings, data=replace(settings.data, tolerance=tolerance)))
    assert manifest.inputs.rejected["damaged_archive"] == 2
    rows_lost = sum(run.end - run.first for run in (runs[1], runs[3])) * ROWS_IN_A_GROUP
    assert (manifest.inputs.files, manifest.inputs.records) == (2, 2 * ROWS - rows_lost + 2)
    assert verify_corpus(tmp_path / "out") == []


def test_a_file_with_other_row_groups_than_planned_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "raw" / "train" / "a.parquet"
    write_parquet(path)
    settings = config(tmp_path / "raw", tmp_path / "out", unit_bytes=1)
    plan = tmp_path / "out" / "preparing" / "plan.json"
    with pytest.raises(PrepareError):
        quietly(replace(settings, data=replace(settings.data, tolerance=ToleranceConfig(rejected_fraction=0))))
    planned = json.loads(plan.read_text())
    assert planned["parts"] == [["train/a.parquet", group, group + 1] for group in range(11)]
    planned["parts"][4:6] = [["train/a.parquet", 4, 6]]
    plan.write_text(json.dumps(planned))
    with pytest.raises(PrepareError, match=r"train/a\.parquet had other row groups when the preparation was begun"):
        quietly(settings)


def test_a_file_whose_end_is_damaged_stays_whole(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path)
    path.write_bytes(path.read_bytes()[:-9])
    source = open_source(config(tmp_path, tmp_path / "out").data)
    item = InputFile("a.parquet", path.stat().st_size, "train")
    assert cut_units(source, [item], 1) == [[item]]


def test_a_damaged_footer_is_damage_of_its_file(tmp_path):
    path = tmp_path / "raw" / "train" / "a.parquet"
    write_parquet(path)
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[-8:-4], "little")
    data[-8 - size : -8] = b"\xff" * size
    path.write_bytes(data)
    write_parquet(tmp_path / "raw" / "train" / "whole.parquet", seed=1)
    settings = config(tmp_path / "raw", tmp_path / "out")
    with pytest.raises(PrepareError, match=r"train/a\.parquet, record 1: damaged_archive: .* is lost"):
        quietly(settings)
    tolerance = ToleranceConfig(rejected_fraction=0.05, damaged_files=1)
    manifest, _ = quietly(replace(settings, data=replace(settings.data, tolerance=tolerance)))
    assert (manifest.inputs.files, manifest.inputs.rejected["damaged_archive"]) == (2, 1)
