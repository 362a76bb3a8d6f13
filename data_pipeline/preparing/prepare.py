"""From a source to a corpus folder: tokenizer, shards, manifest; may be killed at any moment and run again.

The inputs are cut into units by their sizes; what a unit writes depends on the unit alone. Workers, of this command and
of others with the same output, claim units and leave a record of each that is on disk; a restart repeats only units
without one. Whoever finds all records writes the manifest, which comes last.
"""

from __future__ import annotations

import errno
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from conf.problems import ConfigError
from data_pipeline.corpus.corpus import check_shard_file
from data_pipeline.corpus.files import BLOCK_BYTES, sync, write_whole
from data_pipeline.corpus.input_list import INPUTS_FILE, count_files, sum_counts
from data_pipeline.corpus.manifest import (
    MANIFEST_FILE,
    InputsEntry,
    Manifest,
    ReportEntry,
    TokenizerEntry,
    canonical_json,
)
from data_pipeline.corpus.shard_table import ShardTable, shard_path
from data_pipeline.errors import BrokenOffError, PrepareError, TokenizerError
from data_pipeline.ordering.order import derive_key, permute
from data_pipeline.preparing.claims import Claims
from data_pipeline.preparing.config import PrepareConfig, resolve_source, validate_prepare
from data_pipeline.preparing.plan import (
    begin_preparation,
    confirm_finished,
    content_settings,
    refuse_output_at_source,
    refuse_strangers,
)
from data_pipeline.preparing.units import UnitRecord, cut_units, losses, unlabelled_documents
from data_pipeline.preparing.workers import (
    POLL_SECONDS,
    SHOWN_PLACES,
    Job,
    Log,
    WorkFolder,
    check_inputs,
    check_losses,
    run_workers,
    task_of,
)
from data_pipeline.sources.source import Document, InputFile, Rejection, Source
from data_pipeline.sources.sources import open_source
from data_pipeline.tokenizing.encoders import Encoder, ReferenceEncoder, choose_encoder
from data_pipeline.tokenizing.lost_text import describe_losses
from data_pipeline.tokenizing.tokenizer import Tokenizer, load_tokenizer, token_dtype, train_sentencepiece

REPORT_FILE = "report.jsonl"
TOKENIZER_FOLDER = "tokenizer"
# Bytes of documents of the corpus on which a faster library is compared with the reference before it is used.
COMPARED_BYTES = 200_000
COMPARED_CHARACTERS = 20_000


def prepare(config: PrepareConfig, log: Log = print, show_progress: bool = True) -> Manifest | None:
    """Prepare the corpus that `config` describes, or finish or confirm one begun before.

    Returns None when other commands still work on it; the last one of them finishes it. Raises ConfigError with every
    problem of `config`, PrepareError when it cannot start or go on (other settings, no input, too much of it damaged,
    no disk space) and TokenizerError; what was finished stays, and running it again goes on from there.
    """
    if problems := validate_prepare(config):
        raise ConfigError(problems)
    config = resolve_source(config)
    folder = Path(config.output)
    if not (folder / MANIFEST_FILE).exists():
        refuse_output_at_source(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST_FILE).exists():
            try:
                return _prepare(config, folder, log, show_progress)
            except (PrepareError, FileNotFoundError):
                # Unless another command has finished the corpus meanwhile, and removed what it was made with.
                if not (folder / MANIFEST_FILE).exists():
                    raise
        manifest = Manifest.read(folder)
        confirm_finished(config, folder, manifest)
        _remove_leftovers(folder, manifest)
        log(f"{folder}: already prepared, nothing to do ({_summary(manifest)})")
        return manifest
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(folder).free
            raise BrokenOffError(
                f"{folder}: no space left to write ({error.strerror}; {free / 1e6:.0f} MB free). Free some space and "
                "run the same command again: finished units are kept"
            ) from None
        raise BrokenOffError(f"{error.filename or folder}: {error.strerror or error}") from None


def _prepare(config: PrepareConfig, folder: Path, log: Log, show_progress: bool) -> Manifest | None:
    source = open_source(config.data)
    inputs = source.inputs()
    check_inputs(inputs, config.data)
    index, count = task_of(config)
    work = WorkFolder(folder)
    refuse_strangers(folder)
    with Claims(work.claims) as claims:
        units = cut_units(source, inputs, config.unit_bytes)
        resumed = begin_preparation(config, folder, inputs, units, claims)
        # What the plan is missing of a corpus that was finished meanwhile is no preparation that begins.
        _refuse_finished(folder)
        if not resumed and (why := source.why_unlabelled(inputs)):
            log(
                f"the first record has {why}. Records without a label count as '{config.data.source}'; where no record "
                "has one the preparation is refused at its end"
            )
        try:
            tokenizer = _get_tokenizer(config, folder, source, inputs, claims, log)
        except (PrepareError, TokenizerError):
            if not resumed:
                # Nothing was made with these settings: the ones that the message asks for may take their place.
                work.plan.unlink(missing_ok=True)
            raise
        for line in (*tokenizer.notes, *describe_losses(tokenizer)):
            log(line)
        if resumed:
            _drop_damaged(work, folder, [n for n in sorted(work.finished()) if n % count == index], config.workers)
            log(f"{folder}: resuming, {len(work.finished())} of {len(units)} units are finished")
        while True:
            if len(work.finished()) < len(units):
                encoder = _choose_encoder(config, source, inputs, tokenizer, work, log)
                ranks = range(index * config.workers, (index + 1) * config.workers)
                jobs = [
                    Job(config, folder, tokenizer.path, encoder.backend, units, rank, count * config.workers)
                    for rank in ranks
                ]
                run_workers(jobs, source, tokenizer, encoder, claims, log, show_progress)
            with claims.take("finish") as mine:
                _refuse_finished(folder)
                if mine:
                    expected = len(work.finished())
                    records = work.sound_records()
                    if len(records) == len(units):
                        manifest = _finish(config, folder, tokenizer, [records[number] for number in range(len(units))])
                        break
                    if len(records) < expected:
                        # What was removed is this command's to do again: nobody holds it.
                        continue
            # Looked at only now that the claim is given up: whoever writes the last record later finds it free, and
            # whoever found it taken stays until the corpus is finished.
            finished = len(work.finished())
            if finished < len(units):
                _refuse_finished(folder)
                log(
                    f"{folder}: {finished} of {len(units)} units are finished, other commands work on the rest; the "
                    "last one to end finishes the corpus"
                )
                return None
            if not mine:
                time.sleep(POLL_SECONDS)
    _remove_leftovers(folder, manifest)
    _log_result(manifest, folder, config.data.tolerance.lost_text_warning, log)
    return manifest


def _refuse_finished(folder: Path) -> None:
    """Raises PrepareError when another command has finished the corpus: `prepare` takes it as it is."""
    if (folder / MANIFEST_FILE).exists():
        raise PrepareError(f"{folder}: another command has finished this corpus")


def _drop_damaged(work: WorkFolder, folder: Path, numbers: list[int], threads: int) -> None:
    """Forget finished units of which a shard is not on disk as it was written."""

    def check(number: int) -> None:
        record = UnitRecord.read(work.record(number))
        if record is None or any(check_shard_file(folder, shard, with_hash=True) for shard in record.shards):
            work.record(number).unlink(missing_ok=True)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(check, numbers))


def _get_tokenizer(
    config: PrepareConfig, folder: Path, source: Source, inputs: list[InputFile], claims: Claims, log: Log
) -> Tokenizer:
    """The corpus' own copy of the tokenizer, made by the first command that needs it."""
    target = folder / TOKENIZER_FOLDER
    while not target.exists():
        with claims.take(TOKENIZER_FOLDER) as mine:
            if mine and not target.exists():
                _make_tokenizer(config, folder, source, inputs, log)
        if not mine:
            time.sleep(0.5)
    return Tokenizer.load(target)


def _make_tokenizer(config: PrepareConfig, folder: Path, source: Source, inputs: list[InputFile], log: Log) -> None:
    # A name of its own: were two commands ever to be here at once, neither takes the other's files away.
    partial = folder / f"{TOKENIZER_FOLDER}.{uuid.uuid4().hex[:12]}.partial"
    if config.tokenizer.kind == "file":
        load_tokenizer(config.tokenizer).save_to(partial)
    else:
        log(f"training a SentencePiece model with {config.tokenizer.vocab_size} pieces")
        rejections: list[Rejection] = []
        texts = _sample(source, inputs, config.tokenizer.sample_bytes, rejections)
        first = next(texts, None)
        if first is None:
            raise PrepareError(
                "no training document to train the tokenizer on; check data.text_field and data.split, or use "
                "tokenizer=file" + "".join(f"\n  {rejection}" for rejection in rejections)
            )
        model = train_sentencepiece(_chain(first, texts), config.tokenizer)
        partial.mkdir()
        trained = partial / "tokenizer.model"
        trained.write_bytes(model)
        Tokenizer.load(trained).save_to(partial)
    try:
        partial.rename(folder / TOKENIZER_FOLDER)
    except OSError:
        # Unless another command has put the same there.
        if not (folder / TOKENIZER_FOLDER).is_dir():
            raise
        shutil.rmtree(partial)
    sync(folder)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _choose_encoder(
    config: PrepareConfig,
    source: Source,
    inputs: list[InputFile],
    tokenizer: Tokenizer,
    work: WorkFolder,
    log: Log,
) -> Encoder:
    def sample() -> list[str]:
        return [text[:COMPARED_CHARACTERS] for text in _sample(source, inputs, COMPARED_BYTES)]

    if config.tokenizer.backend == "reference":
        return ReferenceEncoder(tokenizer)
    encoder, lines = choose_encoder(tokenizer, config.tokenizer.backend, sample, work.refused_encoders())
    for line in lines:
        log(line)
    return encoder


def _sample(
    source: Source, inputs: list[InputFile], total_bytes: int, rejections: list[Rejection] | None = None
) -> Iterator[str]:
    """Training documents of `total_bytes` in all, from inputs in a fixed random order, a share of each.

    `rejections` gets the first records that give none.
    """
    left = total_bytes
    share = max(left // len(inputs), 2**20)
    for place in permute(np.arange(len(inputs)), len(inputs), derive_key("tokenizer sample")):
        taken = 0
        if inputs[place].split not in (None, "train"):
            continue
        for item in source.read(inputs[place], lambda count: None):
            if isinstance(item, Rejection) and rejections is not None and len(rejections) < SHOWN_PLACES:
                rejections.append(item)
            if isinstance(item, Document) and item.split == "train" and item.text:
                text = item.text.encode("utf-8", "replace").decode("utf-8")
                yield text
                taken += len(text.encode())
                if taken >= min(share, left):
                    break
        left -= taken
        if left <= 0:
            return


def _finish(config: PrepareConfig, folder: Path, tokenizer: Tokenizer, records: list[UnitRecord]) -> Manifest:
    shards = [shard for record in records for shard in record.shards]
    files = [entry for record in records for entry in record.inputs]
    total, rejected, places = losses(records)
    if not shards:
        counts = ", ".join(f"{count} x {reason}" for reason, count in rejected.items()) or "no records"
        raise PrepareError(
            f"no document was found in {count_files(files)} inputs ({counts}); check data.path, data.text_field"
            + "".join(f"\n  {line}" for line in places(SHOWN_PLACES))
        )
    check_losses(records, config.data, enough=1)
    if config.data.source_field and (number := unlabelled_documents(records, config.data.source)):
        _refuse_unlabelled(config, folder, number)
    documents = sum(entry["documents"] for entry in files)
    assert total == documents + sum(rejected.values()) and documents == sum(shard.documents for shard in shards)
    inputs_sha256 = _write_lines(folder / INPUTS_FILE, files)
    report = [line for record in records for line in record.report]
    manifest = Manifest(
        settings=content_settings(config),
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
            files=count_files(files),
            records=total,
            documents=documents,
            rejected=rejected,
            repaired=sum_counts(files, "repaired"),
            lost=sum_counts(files, "lost"),
        ),
        report=ReportEntry(REPORT_FILE, _write_lines(folder / REPORT_FILE, report), len(report)),
    )
    manifest.write(folder)
    return manifest


def _refuse_unlabelled(config: PrepareConfig, folder: Path, documents: int) -> None:
    source = open_source(config.data)
    why = source.why_unlabelled(source.inputs())
    first = f" The first record has {why}." if why else ""
    raise PrepareError(
        f"data.source_field={config.data.source_field}: none of {documents} documents has such a source label, all "
        f"would count as '{config.data.source}'.{first} Set data.source_field to a field that is there, or to null for "
        f"no labels, and choose another output or delete {folder}"
    )


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> str:
    text = "".join(canonical_json(entry) + "\n" for entry in entries)
    return write_whole(path, text.encode()).sha256


def _remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Delete what only an unfinished preparation needs, and files that an interrupted one left behind."""
    shutil.rmtree(WorkFolder(folder).path, ignore_errors=True)
    for path in folder.glob("*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    known = {shard_path(folder, manifest.shards.file(row)) for row in range(len(manifest.shards))}
    for path in (folder / "shards").rglob("*"):
        if path.is_file() and path not in known:
            path.unlink(missing_ok=True)


def _summary(manifest: Manifest) -> str:
    sums = [
        f"{split} {sum(s['tokens'] for s in sources.values()):,} tokens" for split, sources in manifest.splits.items()
    ]
    return f"{manifest.inputs.documents:,} documents; {', '.join(sums)}"


def _log_result(manifest: Manifest, folder: Path, lost_text_warning: float, log: Log) -> None:
    inputs = manifest.inputs
    rejected = sum(inputs.rejected.values())
    log(f"{folder}: prepared {_summary(manifest)}, in {len(manifest.shards)} shards")
    log(f"records read {inputs.records:,} = documents written {inputs.documents:,} + rejected {rejected:,}")
    for title, counts in (("rejected", inputs.rejected), ("repaired", inputs.repaired)):
        for reason, count in counts.items():
            log(f"  {title} {reason}: {count:,} (file and line in {folder / REPORT_FILE})")
    if inputs.lost:
        share = inputs.lost["bytes"] / sum(
            s["text_bytes"] for split in manifest.splits.values() for s in split.values()
        )
        log(
            f"{'WARNING: ' if share > lost_text_warning else ''}the tokenizer lost {inputs.lost['bytes']:,} bytes "
            f"({share:.3%} of the text) in {inputs.lost['documents']:,} documents (file and line of the first in "
            f"{folder / REPORT_FILE})"
        )
