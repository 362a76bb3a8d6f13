"""The training loop."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from data_pipeline.ordering.left_out import begin_of_step
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.loader import StepLoader
from train.checkpoints.writer import CheckpointWriter
from train.context import RunContext
from train.deadline import Deadline
from train.decisions import CONTINUE, Continue, Decision, Rollback, Stop, agreed
from train.errors import RunError
from train.health.saves import CompletedSave
from train.length import last_step, learning_rate_of_next_step, steps_left
from train.mirroring import make_mirror
from train.restore import RunState, go_back
from train.watch.whereabouts import BETWEEN_STEPS, END, FORWARD, REDUCE, SAVE, STEP


@dataclass(frozen=True)
class _Agreement:
    """Sums over ranks of one step; whether any rank wishes to decide something, met a damaged shard, or failed to write
    its part of a checkpoint or to copy one to the mirror."""

    loss: float
    gradient_norm: float
    valid_tokens: float
    wishes: bool
    damage: bool
    save_has_failed: bool
    mirror_has_failed: bool


class Trainer:
    """Takes optimizer steps until the run is complete or a callback stops it. What else happens is up to callbacks.

    The run goes in segments: from a checkpoint, or the beginning, up to the end or to a rollback. Each segment reads
    its data through a loader of its own.
    """

    def __init__(self, context: RunContext, state: RunState):
        self.context = context
        self.config = context.config
        self.plan = context.plan
        self.mesh = context.mesh
        self.stream = context.stream
        self.evaluation_corpora = context.evaluation_corpora
        self.events = context.events
        self.engine = state.engine
        self.state = state.train
        self.callbacks = list(context.callbacks)
        # Of the latest step; not a number before the first.
        self.last_loss = math.nan
        self.last_gradient_norm = math.nan
        self.last_learning_rate = math.nan
        # Of the latest step: whether it was applied, and the positions of its samples in the data order.
        self.last_was_applied = True
        self.last_samples = range(0)
        # Checkpoints that came to be since somebody took them from here; on rank 0, by another thread.
        self.completed_saves: deque[CompletedSave] = deque(maxlen=100)
        # What this rank wishes for and all ranks have not agreed on yet.
        self._wishes: list[Decision] = []
        self._stop_reason: str | None = None
        # Of this rank.
        self.deadline = Deadline(self.config.preemption.seconds_left)
        self._writer = CheckpointWriter(
            context.directory.checkpoints,
            self.mesh,
            self.config.model,
            self.config.checkpoint,
            self.step or None,
            context.attempt,
            make_mirror(context),
        )
        self._restore_callbacks()
        self.restart_clock()

    @property
    def step(self) -> int:
        """Completed steps; while a step is under way, its index."""
        return self.state.step

    @property
    def tokens(self) -> int:
        """Tokens consumed by completed steps."""
        return self.state.tokens

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, those before a change of the batch size counted as they were."""
        return last_step(self.config, self.state)

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run; the last step may go beyond a budget."""
        return self.tokens + steps_left(self.config, self.state) * self.config.tokens_per_step

    @property
    def is_main(self) -> bool:
        return self.mesh.is_main

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    @property
    def model(self) -> torch.nn.Module:
        return self.engine.model

    @property
    def run_directory(self) -> Path:
        return self.context.directory.path

    @property
    def stop_reason(self) -> str | None:
        """Why the run stopped before its end; None while it goes on."""
        return self._stop_reason

    def run(self) -> str:
        """Train; returns "complete", or "stopped" when a callback stopped the run. Raises RunError when it cannot go
        on."""
        outcome = "failed"
        try:
            self.dispatch("on_run_start")
            while isinstance(decision := self._run_segment(), Rollback):
                self._roll_back(decision)
            if isinstance(decision, Stop):
                self._stop_reason = decision.reason
            outcome = "complete" if self.step >= self.total_steps else "stopped"
        except Exception:
            self.mesh.whereabouts.fail()
            raise
        finally:
            with contextlib.ExitStack() as ending:
                self.mesh.whereabouts.enter(END)
                # In reverse, and all of them even where one fails: the last checkpoint comes before everything else.
                for callback in self.callbacks:
                    ending.callback(callback.on_run_end, self, outcome)
        return outcome

    def _run_segment(self) -> Decision:
        """Take steps up to the end of the run, or to a decision that ends the segment; returns the decision."""
        shape = self.mesh.shape
        loader = StepLoader(
            self.stream,
            global_batch_size=self.plan.global_batch_size,
            micro_batch_size=self.plan.micro_batch_size,
            replica=self.mesh.data,
            replicas=shape.data,
            first_sample=self.state.next_sample,
            prefetch_steps=self.config.corpus.prefetch_steps,
            workers=self.config.corpus.workers,
            sequence_rank=self.mesh.sequence,
            sequence_ranks=shape.sequence,
            left_out=self.config.left_out,
        )
        with contextlib.closing(loader):
            self.restart_clock()
            while self.step < self.total_steps:
                decision = self.train_step(loader)
                if not isinstance(decision, Continue):
                    return decision
        # What was wished for at the last step has no next step to be agreed on; a stop would change nothing.
        decision = self._decide()
        return decision if isinstance(decision, Rollback) else CONTINUE

    def train_step(self, loader: StepLoader) -> Decision:
        """One optimizer step over the global batch; returns what all ranks agree to do after it."""
        whereabouts = self.mesh.whereabouts
        whereabouts.begin_step(self.step)
        self._leave_out()
        self.dispatch("on_step_start")
        micro_batches = self._next_micro_batches(loader)
        whereabouts.enter(REDUCE)
        valid_tokens = self._count_valid_tokens(micro_batches)
        whereabouts.enter(FORWARD)
        loss = self.engine.train_batch(micro_batches, valid_tokens.clamp_min(1.0))
        whereabouts.enter(REDUCE)
        norm_on_device = self.engine.gradient_norm()
        self.dispatch("on_gradients_ready")

        agreement = self._agree(loss, norm_on_device, valid_tokens)
        self.last_loss, self.last_gradient_norm = agreement.loss, agreement.gradient_norm
        if agreement.damage:
            self._report_damage()
        if not agreement.valid_tokens:
            raise RunError(
                f"step {self.step} has no target: damaged shards hold all of its samples, number "
                f"{self.state.next_sample} and the {self.plan.global_batch_size - 1} that follow. The events 'damage' "
                "say what is wrong with them; restore the corpus and start the run again"
            )
        decision = self._decide() if agreement.wishes else CONTINUE
        self.last_learning_rate = learning_rate_of_next_step(self.config, self.state)
        whereabouts.enter(STEP)
        # No engine sees the loss: where that is not finite, gradients that are take part in nothing.
        gradient_norm = self.last_gradient_norm if math.isfinite(self.last_loss) else math.nan
        applied = self.engine.step(self.last_learning_rate, gradient_norm)
        whereabouts.enter(BETWEEN_STEPS)
        self._advance(applied)
        if isinstance(decision, Rollback):
            # The step has emptied the engine of its gradients; nothing else of it remains.
            return decision
        self._check_skipped_steps()
        if agreement.save_has_failed:
            self.settle_save()
        if agreement.mirror_has_failed:
            self.settle_mirror(None)
        if self.step % self.config.logging.interval == 0 or self.step == self.total_steps:
            self._log()
        self.dispatch("on_step_end")
        return decision

    def _leave_out(self) -> None:
        """Where the next samples are left out, go on behind them, as the loader does."""
        first, batch = self.state.next_sample, self.plan.global_batch_size
        behind = begin_of_step(first, batch, self.config.left_out)
        if behind > first:
            self.events.append("left_out", step=self.step, first_sample=first, samples=behind - first)
            self._move_on_to(behind)

    def _move_on_to(self, sample: int) -> None:
        """Go on elsewhere in the data."""
        if sample != self.state.next_sample and self.engine.carried is not None:
            # The windows that come next do not follow those that the lanes have seen.
            self.engine.carried.clear()
        self.state.next_sample = sample

    def _next_micro_batches(self, loader: StepLoader) -> list[Batch]:
        started = time.perf_counter()
        micro_batches = next(loader)
        self._data_wait_seconds += time.perf_counter() - started
        return micro_batches

    def _count_valid_tokens(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Targets of the global batch that are scored, fp32 scalar on the device."""
        count = sum(batch.scored_targets() for batch in micro_batches)
        # Every stage of a pipeline reads the same samples: each counts them once.
        return self.mesh.sum(torch.tensor(float(count), device=self.device), group="data_and_sequence")

    def _agree(self, loss: Tensor, gradient_norm: Tensor, valid_tokens: Tensor) -> _Agreement:
        """What all ranks know of the step: its one device wait."""
        mirror = self._writer.mirror
        flags = [
            bool(self._wishes),
            bool(self.stream.damage.unreported()),
            self._writer.has_failed,
            mirror is not None and mirror.has_problem,
        ]
        combined = torch.cat([loss.view(1), torch.tensor(flags, dtype=loss.dtype, device=self.device)])
        self.mesh.sum(combined, group="world")
        total_loss, *found, norm, valid = torch.cat([combined, gradient_norm.view(1), valid_tokens.view(1)]).tolist()
        return _Agreement(total_loss, norm, valid, *(count > 0 for count in found))

    def _decide(self) -> Decision:
        """What follows from the wishes of all ranks. Collective, on steps where some rank has any."""
        mine = list(self._wishes)
        of_ranks = self.mesh.gather_objects(mine, group="world")
        decision = agreed(wish for of_rank in of_ranks for wish in of_rank)
        # A signal may have added to them meanwhile; a stop is still wished for after a rollback.
        followed = [wish for wish in mine if isinstance(wish, type(decision))]
        for wish in followed:
            self._wishes.remove(wish)
        return decision

    def _report_damage(self) -> None:
        """Make events of the damage to shards that any rank has met. Collective, on steps where there is some."""
        first: dict[str, tuple[int, int]] = {}
        for rank, damages in enumerate(self.mesh.gather_objects(self.stream.damage.unreported(), group="world")):
            for damage in damages:
                first.setdefault(damage.problem, (rank, damage.sample))
        for problem, (rank, sample) in first.items():
            self.events.append("damage", step=self.step, rank=rank, first_sample=sample, problem=problem)
        # On all ranks: no other makes it an event again.
        self.stream.damage.mark_reported(first)

    def _advance(self, applied: bool) -> None:
        state = self.state
        self.last_was_applied = applied
        self.last_samples = range(state.next_sample, state.next_sample + self.plan.global_batch_size)
        if applied:
            state.applied_steps += 1
            state.applied_tokens += self.config.tokens_per_step
        else:
            state.skipped_steps += 1
            self.events.append(
                "skip",
                step=state.step,
                loss=repr(self.last_loss),
                grad_norm=repr(self.last_gradient_norm),
                first_sample=state.next_sample,
                samples=self.plan.global_batch_size,
            )
        state.step += 1
        state.tokens += self.config.tokens_per_step
        state.next_sample += self.plan.global_batch_size

    def _check_skipped_steps(self) -> None:
        state = self.state
        if state.skipped_steps > self.config.training.max_skipped_steps:
            raise RunError(
                f"{state.skipped_steps} steps had a loss or gradient that is not finite, more than "
                f"training.max_skipped_steps={self.config.training.max_skipped_steps}; the last at step "
                f"{state.step - 1}. Lower optimizer.learning_rate or look at events.jsonl and the stability statistics"
            )

    def _roll_back(self, rollback: Rollback) -> None:
        """Weights, moments, counters and callbacks as they were at an earlier step; the data begin further on.

        Collective. What was saved later is deleted: a start would take it up.
        """
        left, position = self.step, self.state.next_sample
        # A checkpoint under way may be the one to go back to.
        self.settle_save()
        self.mesh.barrier(group="world")
        self.state, checkpoint = go_back(self.context, self.engine, rollback.step)
        self._writer.rewind(self.step)
        self._restore_callbacks()
        first_skipped, batch = self.state.next_sample, self.plan.global_batch_size
        skipped = position - first_skipped if rollback.skip is None else rollback.skip * batch
        self._move_on_to(first_skipped + skipped)
        self.events.append(
            "rollback",
            step=left,
            to_step=self.step,
            checkpoint=None if checkpoint is None else checkpoint.name,
            first_sample=first_skipped,
            samples=skipped,
            reason=rollback.reason,
        )
        # Of another batch size, which the run may have had since that checkpoint, steps are rounded up.
        self.dispatch("on_rollback", replace(rollback, skip=-(-skipped // batch)), left)

    def _restore_callbacks(self) -> None:
        for callback in self.callbacks:
            callback.load_state_dict(self.state.callbacks.get(type(callback).__name__, {}))

    def _log(self) -> None:
        now = time.perf_counter()
        seconds = now - self._clock
        tokens_per_second = (self.tokens - self._clock_tokens) / seconds
        steps = self.step - self._clock_step
        record: dict[str, Any] = {
            "kind": "train",
            "step": self.step,
            "tokens": self.tokens,
            "loss": self.last_loss,
            "learning_rate": self.last_learning_rate,
            "grad_norm": self.last_gradient_norm,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_gpu": tokens_per_second / self.mesh.size,
            **self.plan.model_flops_utilisation(tokens_per_second / self.mesh.size),
            "step_seconds": seconds / steps,
            "data_wait_seconds": self._data_wait_seconds / steps,
            "data_wait_fraction": self._data_wait_seconds / seconds,
            "memory_gib": _memory_gib(self.device),
            "skipped_steps": self.state.skipped_steps,
        }
        for callback in self.callbacks:
            record |= callback.collect_metrics(self)
        self.dispatch("on_metrics", record)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin a new span for throughput, so that evaluation and start-up do not count as training time."""
        self._clock = time.perf_counter()
        self._clock_tokens = self.tokens
        self._clock_step = self.step
        self._data_wait_seconds = 0.0

    def dispatch(self, hook: str, *arguments: Any) -> None:
        """Call one hook of every callback, in order. What they decide is agreed on at the end of the next step."""
        for callback in self.callbacks:
            decision = getattr(callback, hook)(self, *arguments)
            if decision is not None:
                self.wish(decision)

    def wish(self, decision: Decision) -> None:
        """Ask, on this rank, for a decision; all ranks agree on one, and follow it after the same step. A signal
        handler may call it at any time."""
        if not isinstance(decision, Decision):
            raise TypeError(f"a callback decides on Continue, Stop or Rollback, not on {decision!r}")
        if not isinstance(decision, Continue):
            self._wishes.append(decision)

    def save_checkpoint(self, staying: frozenset[int] = frozenset()) -> None:
        """Start writing a checkpoint of the completed steps, when the one before is settled. Collective.

        `staying`: steps whose checkpoints are not deleted to make room.
        """
        began = time.monotonic()
        self.settle_save()
        waited = time.monotonic() - began
        self.mesh.whereabouts.enter(SAVE)
        self.state.callbacks = {type(callback).__name__: callback.state_dict() for callback in self.callbacks}
        self.state.world_size = self.mesh.size
        self.state.zero_stage = self.config.parallel.zero_stage
        step = self.step

        def on_complete(folder: Path, seconds: float, held: float) -> None:
            times = {"seconds": round(seconds, 3), "held_seconds": round(waited + held, 3)}
            self.events.append("save", step=step, checkpoint=folder.name, **times)
            self.completed_saves.append(CompletedSave(folder.name, step, seconds, time.monotonic()))

        self._writer.staying = staying
        self._writer.save(self.engine, self.state, on_complete)
        self.mesh.whereabouts.enter(BETWEEN_STEPS)

    def keep_checkpoint_of(self, step: int | None) -> None:
        """Let no later checkpoint take the place of the newest one of `step` or before; None: of none. To be said
        again whenever it changes."""
        self._writer.kept_for_going_back = step

    @property
    def saves(self) -> CheckpointWriter:
        """What writes checkpoints: how it fares."""
        return self._writer

    def settle_save(self) -> dict[int, str]:
        """Wait for the checkpoint under way; rank -> why it failed there, which callbacks are told. Collective."""
        self.mesh.whereabouts.enter(SAVE)
        problems = self._writer.settle()
        self.mesh.whereabouts.enter(BETWEEN_STEPS)
        if problems:
            self.dispatch("on_save_failed", problems)
        return problems

    def settle_mirror(self, seconds: float | None) -> None:
        """Wait so long until the mirror has what was saved, None: not at all, and tell callbacks of what failed there.
        Collective."""
        problem, mirror = None, self._writer.mirror
        if mirror is not None:
            problem = mirror.take_problem() if seconds is None else self._writer.settle_mirror(seconds)
        problem = self.mesh.broadcast_object(problem, group="world")
        if problem is not None:
            self.dispatch("on_mirror_failed", problem)

    def await_own_save(self) -> None:
        """Wait until this rank's part of the checkpoint under way is on disk (on rank 0, until all of it is). Raises
        CheckpointError or RunError where it failed."""
        self._writer.wait()


def _memory_gib(device: torch.device) -> float:
    """Peak device memory of this rank since its start on a GPU; resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
