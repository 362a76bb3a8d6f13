"""What surrounds a run for as long as a process works on it: its folder and lock, its mesh, its plan and its data."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from conf import ConfigError
from conf.lasting_output import LastingOutput
from conf.passwords import without_passwords
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import TokenizerError
from data_pipeline.tokenizing.tokenizer import SIDECAR, Tokenizer
from model.locate import complete_checkpoints, step_folder, step_of
from train.callbacks.base import Callback
from train.changes import changes_of_run, refused_changes_of_data
from train.checkpoints.layout import CheckpointError, LaterCheckpointError, remove_torn
from train.checkpoints.mirror_store import MirrorStore
from train.checkpoints.reader import newest_usable
from train.checkpoints.restoring import Restorer, refuse_unknown
from train.checkpoints.state import TrainState, read_state
from train.config import RunConfig
from train.data import RunStream, changes_of_data, data_identity, describe_data
from train.errors import RunError
from train.length import steps_left
from train.memory_check import Room, memory_warnings
from train.origin import Origin, take_up, unknown_tokenizer
from train.parallel.mesh import Mesh, join_mesh, launched_processes
from train.plan import Plan, gib, make_plan
from train.requirements import Requirements, open_requirements
from train.run_directory import (
    Attempt,
    EventLog,
    RunDirectory,
    RunLock,
    code_revision,
    environment_description,
    write_atomically,
)
from train.schedule import last_phase_begins
from train.stop_requests import OUTSIDE_TRAINING
from train.stored_configuration import as_yaml, configuration_before
from train.watch.ends import SIGNAL, End, end_of, remove_ends, unreported_end
from train.watch.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass
class RunContext:
    """One run, opened by this process. Close it, or use it as a context manager: an error inside becomes an event."""

    config: RunConfig
    plan: Plan
    directory: RunDirectory
    mesh: Mesh
    events: EventLog
    stream: RunStream
    evaluation_corpora: dict[str, Corpus]
    # What a position in the data is a position of (`train.data.data_identity`).
    data_identity: dict[str, Any]
    callbacks: Sequence[Callback]
    # What the run begins with; None: its seed, or it has begun.
    origin: Origin | None = None
    # What this process says.
    output: LastingOutput = field(default_factory=LastingOutput)
    # This start of the run; not known until the run's lock is held.
    attempt: Attempt = field(init=False)
    # Of this start; none before its attempt is known.
    watchdog: Watchdog | None = None
    # Where its checkpoints are copied to; None: nowhere.
    mirror_store: MirrorStore | None = None
    # The newest usable checkpoint, and the state in it; None when the run begins.
    checkpoint: Path | None = None
    saved: TrainState | None = None
    # The file in the run's folder that keeps this attempt's configuration. Rank 0 only.
    configuration_file: str | None = None
    # What is closed with the context, last first.
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def is_complete(self) -> bool:
        """Whether an earlier start took the run's last step."""
        return self.saved is not None and not steps_left(self.config, self.saved)

    def say(self, text: str) -> None:
        """Tell whoever watches the run, once."""
        if self.mesh.is_main:
            print(without_passwords(text), file=sys.stderr, flush=True)

    def report_rejected(self, folder: Path, problem: str) -> None:
        """Tell of a checkpoint that is passed over, and make an event of it."""
        self.events.append("reject", checkpoint=folder.name, problem=problem)
        self.warn(f"{folder.name} is passed over: {problem}")

    def report_rejected_at_mirror(self, step: int, problem: str) -> None:
        """The same of one at the mirror; with checkpoint.on_corrupt=fail it ends the run."""
        assert self.mirror_store is not None
        name, where = step_folder(Path(), step).name, self.mirror_store.url
        if self.config.checkpoint.on_corrupt == "fail":
            raise CheckpointError(
                f"{name} at {where}: {problem}. Restore it or delete it there, or set checkpoint.on_corrupt=skip to go "
                "on from the one before (fail)"
            )
        self.events.append("reject", checkpoint=name, problem=f"{problem} (at {where})")
        self.warn(f"{name} at {where} is passed over: {problem}")

    def report_mirror_failed(self, step: int | None, problem: str) -> None:
        """Tell of a mirror that cannot be reached or written to, and make an event of it."""
        self.events.append("mirror_failed", step=step, problem=problem)
        self.warn(f"the mirror fails ({problem}). The run's own checkpoints are untouched")

    def report_damaged_configuration(self, problem: str) -> None:
        """Tell of a file of an earlier start's configuration that is done without, and make an event of it."""
        self.events.append("unreadable", problem=problem)
        self.warn(f"{problem}; the run goes on without it")

    def warn(self, text: str) -> None:
        """Tell of what a user should look at, on the terminal and in the log."""
        self.say(f"WARNING    {text}")
        if self.mesh.is_main:
            log.warning(text)

    def newest_usable(self, last_step: int | None = None) -> Path | None:
        """The checkpoint that the run goes on from, of `last_step` or before. Collective; as `reader.newest_usable`."""
        is_strict = self.config.checkpoint.on_corrupt == "fail"
        return newest_usable(self.directory.checkpoints, self.mesh, self.report_rejected, last_step, is_strict)

    def report_lost_output(self, stream: str, reason: str) -> None:
        """Make an event of an output that nobody reads any more."""
        # A disk may be full: where that was why the output is lost, the run goes on to say so where it matters.
        with contextlib.suppress(OSError):
            self.events.append("output_lost", stream=stream, reason=reason)

    def save_engine_settings(self, settings: dict[str, Any]) -> None:
        """Keep what the engine derived from the configuration in the run's folder."""
        if self.mesh.is_main:
            write_atomically(self.directory.engine_settings, json.dumps(settings, indent=1))

    def close(self, error: BaseException | None = None) -> None:
        """Close the engine, give up the lock, the log file and the process group.

        `error`: what the run failed of; None: nothing. Raises RunError in its place where another rank failed first.
        """
        first = None
        if isinstance(error, Exception) and not isinstance(error, ConfigError):
            first = self._report(error)
        if error is not None and self.mesh.size > 1:
            # Peers may wait in a collective that this rank will not join, and this rank would wait for them with its
            # engine and its process group. The process ends, and its launcher ends them.
            self.closing.pop_all()
        else:
            self._close_all(error)
        if first is not None:
            raise RunError(f"this rank ends because {first.message}") from error

    def _close_all(self, error: BaseException | None) -> None:
        """Close what the run holds. Of two failures a user needs the first: behind an error of a GPU nothing that asks
        the GPU works, and what fails here would be told of in its place."""
        try:
            self.closing.close()
        except Exception:
            if error is None:
                raise
            log.exception("what the failed run held could not be closed")

    def _report(self, error: Exception) -> End | None:
        """Make an event of what ends the run; returns the end of another rank where that is what `error` is about."""
        if self.watchdog is not None:
            return self.watchdog.fail(error)
        # The folder may be what is wrong: not there, not writable, full.
        with contextlib.suppress(OSError):
            self.events.append("error", **end_of(error, self.mesh.rank, "", str(self.mesh.whereabouts.now)).as_event())
        return None

    def __enter__(self) -> RunContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


def open_run(config: RunConfig, callbacks: Sequence[Callback] = (), output: LastingOutput | None = None) -> RunContext:
    """Check everything that a run needs, join its processes, and prepare its folder. Collective.

    Raises ConfigError for a configuration or a corpus that cannot work, ReadingError where reading fails, RunError for
    ranks that do not agree or a disk without room, BlockingIOError when another command works on the run,
    CheckpointError when none of its checkpoints can be used.
    """
    # Before the ranks meet: each finds the same problems, and none waits for another that has ended.
    # One look at every shard's file is enough; each rank checks what it reads.
    corpus_check = "size" if int(os.environ.get("RANK", 0)) == 0 else "none"
    found = open_requirements(config, launched_processes(), corpus_check)
    timeout = timedelta(seconds=config.parallel.collective_timeout_seconds)
    mesh = join_mesh(timeout, config.parallel.pipeline, config.parallel.sequence)
    OUTSIDE_TRAINING.processes_met(mesh.size)
    context = RunContext(
        config=config,
        plan=found.plan,
        directory=found.directory,
        mesh=mesh,
        events=EventLog(found.directory.events, mesh.is_main),
        stream=found.stream,
        evaluation_corpora=found.evaluation_corpora,
        data_identity=data_identity(found.stream),
        callbacks=callbacks,
        origin=found.origin,
        mirror_store=found.mirror_store,
        output=output or LastingOutput(),
    )
    context.closing.callback(mesh.close)
    try:
        _enter(context, found)
    except BaseException as error:
        context.close(error)
        raise
    return context


def _enter(context: RunContext, found: Requirements) -> None:
    """Take the folder into use, on all ranks alike."""
    config, mesh, directory, closing = context.config, context.mesh, context.directory, context.closing
    if mesh.is_main:
        directory.create()
    _check_same_on_all_ranks(context)
    attempt, damaged = "", list[str]()
    if mesh.is_main:
        lock = RunLock(directory.lock)
        closing.callback(lock.release)
        attempt = lock.attempt.identity
        _tell_of_start_before(context, lock.attempt_before)
        # Another command may have begun and ended the run since its folder was looked at without the lock.
        if problems := changes_of_run(config, directory):
            raise ConfigError(problems)
        _, damaged = configuration_before(directory)
        remove_torn(directory.checkpoints)
        directory.remove_partials()
    # No rank goes on before rank 0 holds the lock.
    context.attempt = Attempt(mesh.broadcast_object(attempt, group="world"), directory.lock)
    log = directory.log(mesh.rank)
    closing.enter_context(_log_to_file(log))
    closing.enter_context(context.output.spilling_to(log, context.report_lost_output))
    _watch(context)
    if mesh.device.type == "cpu" and config.training.cpu_threads is not None:
        closing.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(config.training.cpu_threads)
    for problem in damaged:
        context.report_damaged_configuration(problem)
    context.checkpoint = _newest_checkpoint(context)
    if context.checkpoint is None and context.origin is not None:
        _begin_from(context, context.origin)
    if context.checkpoint is not None:
        _go_on_from(context, context.checkpoint)
    if mesh.is_main and not context.is_complete:
        _prepare_folder(context, found)
    mesh.barrier(group="world")
    assert context.watchdog is not None
    context.watchdog.meet()


def _newest_checkpoint(context: RunContext) -> Path | None:
    """What the run goes on from: its newest usable checkpoint, or a newer one at the mirror. Collective."""
    store = context.mirror_store
    if store is None:
        return context.newest_usable()
    own, damage = None, None
    try:
        own = context.newest_usable()
    except LaterCheckpointError:
        raise
    except CheckpointError as error:
        if context.config.checkpoint.on_corrupt == "fail":
            raise
        damage = error
    restorer = Restorer(store, context.directory, context.attempt, context.mesh)
    steps, problem = restorer.newer_steps(None if own is None else step_of(own))
    if problem and own is None:
        raise damage or refuse_unknown(store, problem)
    if problem:
        context.report_mirror_failed(None if own is None else step_of(own), f"{store.url}: {problem}")
    restored = restorer.restore(steps, context.report_rejected_at_mirror)
    if restored is None:
        if steps and own is None:
            raise damage or CheckpointError(
                f"no checkpoint at {store.url} can be restored (see the lines before), and there is none in "
                f"{context.directory.checkpoints}. Restore one of them, or set checkpoint.mirror=null to begin without"
            )
        if damage is not None:
            raise damage
        return own
    seconds = round(restored.seconds, 3)
    context.events.append(
        "restore", step=restored.step, checkpoint=restored.folder.name, mirror=store.url, seconds=seconds
    )
    context.say(f"Restored {restored.folder.name} from the mirror {store.url} in {seconds:g} s.")
    return context.newest_usable()


def _tell_of_start_before(context: RunContext, attempt: str) -> None:
    """Make an event of how the start before ended, where it could not do so itself. Rank 0 only, under the lock."""
    end = unreported_end(context.directory, attempt)
    if end is not None:
        if end.kind == SIGNAL:
            context.events.append("stop", step=None, reason=end.message)
        else:
            context.events.append_failure(**end.as_event(found_by="the next start"))
        context.say(f"The start before this one ended: {end.message}.")
    remove_ends(context.directory)


def _watch(context: RunContext) -> None:
    """From here on a rank that fails, or does not move, ends the run. Collective."""
    config, mesh = context.config, context.mesh
    context.watchdog = Watchdog(
        mesh,
        context.attempt,
        context.directory,
        context.events,
        config.watchdog.seconds,
        config.parallel.collective_timeout_seconds,
    )
    context.watchdog.start()
    context.closing.callback(context.watchdog.close)
    OUTSIDE_TRAINING.on_end = context.watchdog.leave
    context.closing.callback(setattr, OUTSIDE_TRAINING, "on_end", None)


def _begin_from(context: RunContext, origin: Origin) -> None:
    """Take up what the run begins with: a branch then has its parent's checkpoint as its own. Collective."""
    if problems := take_up(origin, context.mesh, context.directory, context.attempt):
        raise ConfigError(problems)
    ancestry = origin.ancestry()
    if origin.stored.located.tokenizer is None:
        context.say(f"WARNING    {unknown_tokenizer(ancestry['source'])}")
    if not origin.is_branch:
        context.events.append("initialise", **ancestry)
        context.say(f"Weights of {ancestry['source']}; optimizer, schedule and data begin anew.")
        return
    context.events.append("branch", **ancestry)
    context.say(f"Branch of {ancestry['source']}.")
    context.checkpoint = context.newest_usable()


def _go_on_from(context: RunContext, checkpoint: Path) -> None:
    """Look at what the run goes on from. Raises ConfigError where its position means nothing in today's data."""
    context.saved = read_state(checkpoint)
    # Another one than was looked at without the ranks, where that was damaged.
    context.plan = make_plan(context.config, context.mesh.size, state=context.saved)
    if problems := refused_changes_of_data(context.config, context.saved, context.data_identity):
        raise ConfigError(problems)


def _check_same_on_all_ranks(context: RunContext) -> None:
    config = context.config
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()
    found = context.mesh.gather_objects((digest, context.data_identity), group="world")
    odd = [rank for rank, (other, _) in enumerate(found) if other != found[0][0]]
    if odd:
        raise RunError(f"ranks {odd} were started with another configuration than rank 0; start all with one command")
    odd = [rank for rank, (_, other) in enumerate(found) if other != found[0][1]]
    if odd:
        keys = ", ".join(changes_of_data(found[0][1], found[odd[0]][1]))
        raise RunError(
            f"ranks {odd} read other data than rank 0 at {config.corpus.directory} (they differ in {keys}); bring the "
            "same corpus to all nodes"
        )


def _prepare_folder(context: RunContext, found: Requirements) -> None:
    """Everything in the run's folder that is known before the first step. Rank 0 only."""
    config, plan, directory = context.config, context.plan, context.directory
    _check_room(config, plan, directory)
    context.configuration_file = directory.keep_configuration(as_yaml(config))
    write_atomically(directory.plan, json.dumps(plan.as_dict(), indent=1))
    repository = Path(__file__).resolve().parents[1]
    # What is not committed may be meant for nobody else.
    write_atomically(directory.code, json.dumps(code_revision(repository), indent=1), mode=0o600)
    write_atomically(directory.environment, json.dumps(environment_description(), indent=1))
    _keep_tokenizer(found.corpus.tokenizer(), directory.tokenizer)
    lines = [
        f"run        {directory.path}, with a log of each process in {directory.logs.name}/",
        plan.describe(),
        describe_data(config, plan, context.stream),
        *memory_warnings(config, plan, Room.here(plan.world_size)),
    ]
    context.say("\n".join(lines))


def _keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Leave a copy of `tokenizer` in `folder`, in the place of another that the run had before."""
    # Written last: without it an earlier start was killed while it copied.
    with contextlib.suppress(TokenizerError):
        if (folder / SIDECAR).is_file() and Tokenizer.load(folder).fingerprint == tokenizer.fingerprint:
            return
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save_to(folder)


def _check_room(config: RunConfig, plan: Plan, directory: RunDirectory) -> None:
    """Of the checkpoints that are kept and the one that is written before the oldest goes, some may be there."""
    free, there = shutil.disk_usage(directory.path).free, len(complete_checkpoints(directory.checkpoints))
    interval, named = config.checkpoint.interval, len(config.checkpoint.keep_at)
    to_come = named + (1 if not interval else -(-(plan.total_steps - plan.completed_steps) // interval))
    decays = last_phase_begins(config.schedule, plan.total_steps) is not None
    beyond = int(config.checkpoint.keep_best is not None) + int(config.checkpoint.keep_before_decay and decays)
    # One stays until it is copied.
    beyond += int(config.checkpoint.mirror is not None)
    missing = max(1, min(to_come, config.checkpoint.keep_last + named + beyond + 1 - there))
    if free < missing * plan.checkpoint_bytes:
        raise RunError(
            f"{directory.path} has {gib(free)} free, and {missing} more checkpoints of {gib(plan.checkpoint_bytes)} "
            f"each will be there at once (checkpoint.keep_last={config.checkpoint.keep_last}, and one that is being "
            "written); make room, keep fewer, or set run_root to another disk"
        )


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_passwords(super().format(record))


@contextlib.contextmanager
def _log_to_file(path: Path) -> Iterator[None]:
    """What Python code logs on this rank goes to its file."""
    handler = logging.FileHandler(path)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # The second one passes nothing on to the first.
    loggers = [logging.getLogger(), logging.getLogger("DeepSpeed")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
