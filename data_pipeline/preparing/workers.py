"""The processes that prepare units: each claims the next free one, until none is left.

The same loop serves one process, several on a node, and several nodes: nothing is dealt beforehand but where each
begins.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from conf.slurm_variables import array_task
from data_pipeline.corpus.manifest import MANIFEST_FILE, PREPARING_FOLDER
from data_pipeline.errors import BrokenOffError, DataError, PrepareError
from data_pipeline.preparing.claims import Claims
from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.preparing.progress import METER_LENGTH, Meter, Progress
from data_pipeline.preparing.units import UnitRecord, losses, lost_text, run_unit
from data_pipeline.sources.config import TEXT_KINDS, TOLERANCE_RECORDS, DataConfig
from data_pipeline.sources.source import FILE_LOST, InputFile, Source
from data_pipeline.sources.sources import open_source
from data_pipeline.tokenizing.encoders import Encoder, EncoderMismatchError, ReferenceEncoder, build_encoder
from data_pipeline.tokenizing.tokenizer import Tokenizer

# Places of rejected records that an error shows.
SHOWN_PLACES = 5
# Seconds between two looks at units that others hold.
POLL_SECONDS = 1.0
Log = Callable[[str], None]


class WorkFolder:
    """What a preparation keeps beside the corpus until it is finished."""

    def __init__(self, corpus: Path):
        self.path = corpus / PREPARING_FOLDER
        self.plan = self.path / "plan.json"
        self.claims = self.path / "claims"
        self._units = self.path / "units"
        self._refused = self.path / "refused_encoders"

    def create(self) -> None:
        for folder in (self._units, self._refused):
            folder.mkdir(parents=True, exist_ok=True)

    def record(self, unit: int) -> Path:
        return self._units / f"{unit:06d}.json"

    def finished(self) -> set[int]:
        """Numbers of the units that have a record."""
        try:
            return {int(name[:-5]) for name in os.listdir(self._units) if name.endswith(".json")}
        except FileNotFoundError:
            return set()

    def sound_records(self) -> dict[int, UnitRecord]:
        """Records of the finished units. One that cannot be read, or whose encoder was refused since, is removed."""
        records = {}
        refused = self.refused_encoders()
        for unit in sorted(self.finished()):
            record = UnitRecord.read(self.record(unit))
            if record is None or record.encoder in refused:
                self.record(unit).unlink(missing_ok=True)
            else:
                records[unit] = record
        return records

    def refuse_encoder(self, name: str) -> None:
        """Remember, for all processes, that a library does not give the reference's ids."""
        (self._refused / name).touch()

    def refused_encoders(self) -> set[str]:
        return set(os.listdir(self._refused))


@dataclass
class Job:
    """What one worker needs to know. `rank` of `ranks` workers in all commands: where it begins."""

    config: PrepareConfig
    folder: Path
    tokenizer_path: Path
    backend: str
    units: list[list[InputFile]]
    rank: int
    ranks: int


def task_of(config: PrepareConfig) -> tuple[int, int]:
    """(index, count) of this command among those that share the work. Raises PrepareError."""
    if config.task_index is not None and config.task_count is not None:
        return config.task_index, config.task_count
    task = array_task()
    if task is None:
        return 0, 1
    if task.index is None:
        raise PrepareError(
            f"the Slurm array has {task.count} tasks with ids from {task.first} to {task.last}, not in equal steps; "
            "set task_index and task_count"
        )
    return task.index, task.count


def run_workers(
    jobs: list[Job], source: Source, tokenizer: Tokenizer, encoder: Encoder, claims: Claims, log: Log, shown: bool
) -> None:
    """Prepare all units that no other command holds: here with one job, else a process a job.

    Raises the DataError or OSError of a worker.
    """
    work = WorkFolder(jobs[0].folder)
    unit_bytes = [sum(item.bytes_to_read for item in unit) for unit in jobs[0].units]
    context = multiprocessing.get_context("spawn")
    numbers = [context.RawArray("q", METER_LENGTH) for _ in jobs]
    with Progress(unit_bytes, work.finished, numbers, log, shown) as progress:
        if len(jobs) == 1:
            _work(jobs[0], source, tokenizer, encoder, claims, Meter(numbers[0], progress.tick), log)
        else:
            _run_processes(context, jobs, numbers, log, progress)


def _run_processes(context: SpawnContext, jobs: list[Job], numbers: list[Any], log: Log, progress: Progress) -> None:
    workers = {}
    try:
        for job, shared in zip(jobs, numbers, strict=True):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(job, shared, sender, os.getpid()), daemon=True)
            process.start()
            sender.close()
            workers[receiver] = (process, shared)
        open_pipes = list(workers)
        while open_pipes:
            ready = wait(open_pipes, timeout=0.5)
            for receiver in [pipe for pipe in open_pipes if pipe in ready]:
                try:
                    message = receiver.recv()
                except EOFError:
                    open_pipes.remove(receiver)
                    _check_ended(*workers[receiver], jobs)
                    continue
                if isinstance(message, Exception):
                    raise message
                log(message)
            progress.tick()
    finally:
        for process, _ in workers.values():
            process.terminate()
            process.join()


def _check_ended(process: SpawnProcess, numbers: Sequence[int], jobs: list[Job]) -> None:
    process.join()
    if process.exitcode:
        how = f"was killed by signal {-process.exitcode}" if process.exitcode < 0 else f"ended with {process.exitcode}"
        *_, unit, place = numbers
        where = f" while it read {jobs[0].units[unit - 1][place - 1].name}" if unit else ""
        raise BrokenOffError(
            f"one of {len(jobs)} workers {how}{where} (out of memory?); finished units are kept: run the same command "
            "again, with fewer workers if it was memory"
        )


def _worker(job: Job, numbers: MutableSequence[int], sender: Connection, parent: int) -> None:
    """Main function of a worker process. Sends lines to log, and the exception that ended it."""
    import pyarrow

    # Cores are shared out by processes; the parent tells the workers when a person interrupts it.
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pyarrow.set_cpu_count(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        tokenizer = Tokenizer.load(job.tokenizer_path)
        encoder = build_encoder(tokenizer, job.backend)
        with Claims(WorkFolder(job.folder).claims, parent) as claims:
            _work(job, open_source(job.config.data), tokenizer, encoder, claims, Meter(numbers), sender.send)
    except (DataError, OSError) as error:
        sender.send(error)


def _work(
    job: Job, source: Source, tokenizer: Tokenizer, encoder: Encoder, claims: Claims, meter: Meter, log: Log
) -> None:
    work = WorkFolder(job.folder)
    records: list[UnitRecord] = []
    first = job.rank * len(job.units) // job.ranks
    waiting = [*range(first, len(job.units)), *range(first)]
    try:
        while waiting:
            held = []
            for number in waiting:
                if work.record(number).exists():
                    continue
                with claims.take(f"{number:06d}") as mine:
                    if not mine:
                        held.append(number)
                    elif not work.record(number).exists():
                        if encoder.name in work.refused_encoders():
                            encoder = ReferenceEncoder(tokenizer)
                        record, encoder = _run_checked(job, number, source, tokenizer, encoder, meter, log)
                        record.write(work.record(number))
                        records.append(record)
                        check_losses(records, job.config.data, TOLERANCE_RECORDS)
                meter.end_unit()
            if held == waiting:
                if all(claims.surely_held(f"{number:06d}") for number in held):
                    return
                time.sleep(POLL_SECONDS)
            waiting = held
    except FileNotFoundError:
        # Another command has finished the corpus and removed the work folder.
        if not (job.folder / MANIFEST_FILE).exists():
            raise


def _run_checked(
    job: Job, number: int, source: Source, tokenizer: Tokenizer, encoder: Encoder, meter: Meter, log: Log
) -> tuple[UnitRecord, Encoder]:
    """The record of a unit, and the encoder to go on with: the reference after a faster one was found to differ."""
    rest = (job.config, job.folder, meter)
    try:
        return run_unit(number, job.units[number], source, tokenizer, encoder, *rest), encoder
    except EncoderMismatchError as error:
        WorkFolder(job.folder).refuse_encoder(encoder.name)
        log(f"{encoder.name} is not used any more, and what it encoded will be encoded again: {error}")
        encoder = ReferenceEncoder(tokenizer)
        return run_unit(number, job.units[number], source, tokenizer, encoder, *rest), encoder


def check_losses(records: list[UnitRecord], data: DataConfig, enough: int) -> None:
    """Raises PrepareError when units lost more than `data.tolerance` allows, with counts and the first places.

    The share of rejected records is only looked at when at least `enough` records were read.
    """
    total, rejected, places = losses(records)
    _refuse_lost_text(records, data, total >= enough)
    entries = (entry for record in records for entry in record.inputs)
    damaged = len({entry["file"] for entry in entries if entry["rejected"].keys() & set(FILE_LOST)})
    _refuse_losses(data, damaged, total if total >= enough else 0, rejected, places(SHOWN_PLACES))


def _refuse_lost_text(records: list[UnitRecord], data: DataConfig, enough: bool) -> None:
    lost, share = lost_text(records)
    allowed = data.tolerance.lost_text_fraction
    if not enough or share <= allowed:
        return
    lines = [line for record in records for line in record.report if line["action"] == "lost"]
    shown = "\n".join(f"  {line['file']}, record {line['position']}: {line['detail']}" for line in lines[:SHOWN_PLACES])
    raise PrepareError(
        f"the tokenizer loses too much of the text: {lost['bytes']:,} bytes of {lost['documents']:,} documents "
        f"({share:.3%}) have no token, data.tolerance.lost_text_fraction allows {allowed:.3%}. "
        f"The first places:\n{shown}\nTake a tokenizer with bytes for what is not in its vocabulary (a trained one: "
        "tokenizer.byte_fallback=true) and another output, or raise the tolerance and run the same command again"
    )


def check_inputs(inputs: list[InputFile], data: DataConfig) -> None:
    """Raises PrepareError when `data.tolerance` does not allow what cannot be read of these inputs, before any is read.

    So that what is mended then is no other input than that of a preparation begun.
    """
    lost = sorted((item.lost for item in inputs if item.lost), key=lambda rejection: not rejection.loses_a_file)
    damaged = sum(rejection.loses_a_file for rejection in lost)
    # Files of records hold nobody knows how many; a file of a text tree is one.
    rejected = Counter(rejection.reason for rejection in lost)
    records = len(inputs) if data.kind in TEXT_KINDS else 0
    _refuse_losses(data, damaged, records, rejected, [str(rejection) for rejection in lost[:SHOWN_PLACES]])


def _refuse_losses(data: DataConfig, damaged: int, total: int, rejected: dict[str, int], places: list[str]) -> None:
    """`total`: records of which `rejected` are a share; 0: too few, or unknown."""
    tolerance = data.tolerance
    problems = []
    if damaged > tolerance.damaged_files:
        problems.append(f"{damaged} damaged files, data.tolerance.damaged_files allows {tolerance.damaged_files}")
    count = sum(rejected.values())
    if total and count > tolerance.rejected_fraction * total:
        reasons = ", ".join(f"{number} x {reason}" for reason, number in rejected.items())
        problems.append(
            f"{count} of {total} records ({count / total:.3%}) rejected ({reasons}), "
            f"data.tolerance.rejected_fraction allows {tolerance.rejected_fraction:.3%}"
        )
    if problems:
        shown = "\n".join(f"  {line}" for line in places)
        raise PrepareError(
            f"too much of the input is lost: {'; '.join(problems)}. The first places:\n{shown}\nMend the input, or "
            "leave files out (data.exclude), and choose another output; or raise the tolerance and run the same "
            "command again"
        )
