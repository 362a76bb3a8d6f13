"""From a source to a corpus folder: tokenizer, shards, manifest; may be killed at any moment and run again.

The inputs are cut into units by their sizes; what a unit writes depends on the unit alone. A journal gets one line when
a unit is on disk, and a restart repeats only units without one. The manifest comes last.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.config import PrepareConfig
from data_pipeline.errors import PrepareError
from data_pipeline.manifest import (
    MANIFEST_FILE,
    InputsEntry,
    Manifest,
    ReportEntry,
    ShardTable,
    TokenizerEntry,
    canonical_json,
)
from data_pipeline.order import derive_key, permute
from data_pipeline.progress import Progress
from data_pipeline.shards import BLOCK_BYTES, sync_folder, token_dtype, write_atomically
from data_pipeline.sources import Document, InputFile, Source, open_source
from data_pipeline.tokenizer import Tokenizer, train_sentencepiece
from data_pipeline.units import Journal, UnitRecord, cut_units, run_unit

PLAN_FILE = "prepare.json"
JOURNAL_FILE = "journal.jsonl"
INPUTS_FILE = "inputs.jsonl"
REPORT_FILE = "report.jsonl"
LOCK_FILE = ".lock"
TOKENIZER_FOLDER = "tokenizer"
Log = Callable[[str], None]


def prepare(config: PrepareConfig, log: Log = print, show_progress: bool = True) -> Manifest:
    """Prepare the corpus that `config` describes, or finish or confirm one begun before.

    Raises PrepareError when it cannot start or go on (other settings, another process, no input, no disk space) and
    TokenizerError; what was finished stays, and running it again goes on from there.
    """
    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            return _prepare(config, folder, log, show_progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(folder).free
            raise PrepareError(
                f"{folder}: no space left to write ({error.strerror}; {free / 1e6:.0f} MB free). Free some space and "
                "run the same command again: finished units are kept"
            ) from None
        raise PrepareError(f"{error.filename or folder}: {error.strerror or error}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / LOCK_FILE, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(f"{folder}: another process is preparing this corpus; wait for it or end it") from None
        yield


def _prepare(config: PrepareConfig, folder: Path, log: Log, show_progress: bool) -> Manifest:
    settings = _settings(config)
    if (folder / MANIFEST_FILE).exists():
        manifest = Manifest.read(folder)
        _confirm_finished(config, folder, manifest, settings)
        _remove_leftovers(folder, manifest)
        log(f"{folder}: already prepared, nothing to do ({_summary(manifest)})")
        return manifest
    source = open_source(config.data)
    inputs = source.inputs()
    resumed = _check_plan(folder, settings, inputs)
    tokenizer = _get_tokenizer(config, folder, source, inputs, log)
    units = cut_units(inputs, config.unit_bytes)
    with Journal(folder / JOURNAL_FILE, folder) as journal:
        if resumed:
            log(f"{folder}: resuming, {len(journal.records)} of {len(units)} units are finished")
        done_bytes = sum(item.bytes for number in journal.records for item in units[number])
        total_bytes = sum(item.bytes for item in inputs)
        with Progress(total_bytes, done_bytes, log, show_progress) as progress:
            for number, items in enumerate(units):
                if number not in journal.records:
                    journal.append(run_unit(number, items, source, tokenizer, config, folder, progress))
        records = [journal.records[number] for number in range(len(units))]
    manifest = _finish(folder, settings, tokenizer, records)
    _log_result(manifest, folder, log)
    return manifest


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What the corpus' content depends on beside the input; no absolute path, so that a moved source is the same."""
    data = dataclasses.asdict(config.data)
    if config.data.kind != "datasets" or Path(config.data.path).exists():
        del data["path"]
    tokenizer = dataclasses.asdict(config.tokenizer)
    if config.tokenizer.kind == "file":
        loaded = Tokenizer.load(config.tokenizer.path, config.tokenizer.eod_token)
        tokenizer = {"kind": "file", "fingerprint": loaded.fingerprint}
    sizes = {"shard_bytes": config.shard_bytes, "unit_bytes": config.unit_bytes}
    return {"data": data, "tokenizer": tokenizer, **sizes}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _refuse_other_settings(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before, now = _flatten(old), _flatten(new)
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        lines = "\n".join(f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in changed)
        raise PrepareError(
            f"{folder}: was prepared with other settings:\n{lines}\nUse these settings, another output, or delete it"
        )


def _refuse_other_inputs(folder: Path, old: dict[str, int], inputs: list[InputFile]) -> None:
    new = {item.name: item.bytes for item in inputs}
    lines = [f"  {name}: new" for name in new if name not in old]
    lines += [f"  {name}: gone" for name in old if name not in new]
    lines += [
        f"  {name}: {old[name]} bytes there, {new[name]} now" for name in new if old.get(name, new[name]) != new[name]
    ]
    if lines:
        shown = "\n".join(lines[:10] + ([f"  and {len(lines) - 10} more"] if len(lines) > 10 else []))
        raise PrepareError(f"{folder}: was prepared from other input files:\n{shown}\nUse another output, or delete it")


def _confirm_finished(config: PrepareConfig, folder: Path, manifest: Manifest, settings: dict[str, Any]) -> None:
    _refuse_other_settings(folder, manifest.settings, settings)
    if config.data.kind == "datasets" or config.data.path and not Path(config.data.path).exists():
        return
    with open(folder / manifest.inputs.file, encoding="utf-8") as file:
        old = {entry["file"]: entry["bytes"] for entry in map(json.loads, file)}
    _refuse_other_inputs(folder, old, open_source(config.data).inputs())


def _check_plan(folder: Path, settings: dict[str, Any], inputs: list[InputFile]) -> bool:
    """Record what is being prepared, or compare with what was; returns whether the folder had been begun."""
    path = folder / PLAN_FILE
    if path.exists():
        plan = json.loads(path.read_bytes())
        _refuse_other_settings(folder, plan["settings"], settings)
        _refuse_other_inputs(folder, dict(plan["inputs"]), inputs)
        return True
    strangers = sorted(p.name for p in folder.iterdir() if p.name != LOCK_FILE and p.suffix != ".partial")
    if strangers:
        raise PrepareError(f"{folder}: not empty (it holds {strangers[0]}) and not a corpus; choose another output")
    plan = {"settings": settings, "inputs": [[item.name, item.bytes] for item in inputs]}
    write_atomically(path, lambda put: put(canonical_json(plan).encode()))
    return False


def _get_tokenizer(config: PrepareConfig, folder: Path, source: Source, inputs: list[InputFile], log: Log) -> Tokenizer:
    target = folder / TOKENIZER_FOLDER
    if target.exists():
        return Tokenizer.load(target)
    partial = folder / f"{TOKENIZER_FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if config.tokenizer.kind == "file":
        Tokenizer.load(config.tokenizer.path, config.tokenizer.eod_token).save_to(partial)
    else:
        log(f"training a SentencePiece model with {config.tokenizer.vocab_size} pieces")
        model = train_sentencepiece(_tokenizer_sample(config, source, inputs), config.tokenizer)
        partial.mkdir()
        trained = partial / "tokenizer.model"
        trained.write_bytes(model)
        Tokenizer.load(trained).save_to(partial)
    partial.rename(target)
    sync_folder(folder)
    return Tokenizer.load(target)


def _tokenizer_sample(config: PrepareConfig, source: Source, inputs: list[InputFile]) -> Iterator[str]:
    """Training documents of `sample_bytes` in all, from inputs in a fixed random order, a share of each."""
    left = config.tokenizer.sample_bytes
    share = max(left // len(inputs), 2**20)
    found = False
    for place in permute(range(len(inputs)), len(inputs), derive_key("tokenizer sample")):
        taken = 0
        if inputs[place].split not in (None, "train"):
            continue
        for item in source.read(inputs[place], lambda count: None):
            if isinstance(item, Document) and item.split == "train" and item.text:
                found = True
                text = item.text.encode("utf-8", "replace").decode("utf-8")
                yield text
                taken += len(text.encode())
                if taken >= min(share, left):
                    break
        left -= taken
        if left <= 0:
            return
    if not found:
        raise PrepareError("no training document to train the tokenizer on; use tokenizer=file, or change data.split")


def _finish(folder: Path, settings: dict[str, Any], tokenizer: Tokenizer, records: list[UnitRecord]) -> Manifest:
    shards = [shard for record in records for shard in record.shards]
    files = [entry for record in records for entry in record.inputs]
    rejected, repaired = _sum_counts(files, "rejected"), _sum_counts(files, "repaired")
    if not shards:
        counts = ", ".join(f"{count} x {reason}" for reason, count in rejected.items()) or "no records"
        raise PrepareError(f"no document was found in {len(files)} inputs ({counts}); check data.path, data.text_field")
    inputs_sha256 = _write_lines(folder / INPUTS_FILE, files)
    report = [line for record in records for line in record.report]
    manifest = Manifest(
        settings=settings,
        tokenizer=TokenizerEntry(
            file=tokenizer.path.relative_to(folder).as_posix(),
            kind=tokenizer.kind,
            sha256=tokenizer.file_sha256,
            fingerprint=tokenizer.fingerprint,
            library=tokenizer.library,
            library_version=tokenizer.library_version,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            eod_token=tokenizer.eod_token,
            probe_sha256=tokenizer.probe_sha256,
        ),
        token_dtype=str(token_dtype(tokenizer.vocab_size)),
        block_bytes=BLOCK_BYTES,
        shards=ShardTable.from_entries(shards),
        inputs=InputsEntry(
            file=INPUTS_FILE,
            sha256=inputs_sha256,
            files=len(files),
            records=sum(entry["records"] for entry in files),
            documents=sum(entry["documents"] for entry in files),
            rejected=rejected,
            repaired=repaired,
        ),
        report=ReportEntry(REPORT_FILE, _write_lines(folder / REPORT_FILE, report), len(report)),
    )
    manifest.write(folder)
    _remove_leftovers(folder, manifest)
    return manifest


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> str:
    text = "".join(canonical_json(entry) + "\n" for entry in entries)
    return write_atomically(path, lambda put: put(text.encode())).sha256


def _sum_counts(files: list[dict[str, Any]], key: str) -> dict[str, int]:
    sums: dict[str, int] = {}
    for entry in files:
        for reason, count in entry[key].items():
            sums[reason] = sums.get(reason, 0) + count
    return dict(sorted(sums.items()))


def _remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Delete what only an unfinished preparation needs, and shard files that an interrupted one left behind."""
    for name in (PLAN_FILE, JOURNAL_FILE):
        (folder / name).unlink(missing_ok=True)
    known = {folder / shard.file for shard in manifest.shards}
    for path in (folder / "shards").rglob("*"):
        if path.is_file() and path not in known:
            path.unlink()


def _summary(manifest: Manifest) -> str:
    sums = [
        f"{split} {sum(s['tokens'] for s in sources.values()):,} tokens" for split, sources in manifest.splits.items()
    ]
    return f"{manifest.inputs.documents:,} documents; {', '.join(sums)}"


def _log_result(manifest: Manifest, folder: Path, log: Log) -> None:
    inputs = manifest.inputs
    rejected = sum(inputs.rejected.values())
    log(f"{folder}: prepared {_summary(manifest)}, in {len(manifest.shards)} shards")
    log(f"records read {inputs.records:,} = documents written {inputs.documents:,} + rejected {rejected:,}")
    for title, counts in (("rejected", inputs.rejected), ("repaired", inputs.repaired)):
        for reason, count in counts.items():
            log(f"  {title} {reason}: {count:,} (file and line of each in {folder / REPORT_FILE})")
