"""The training loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from data_pipeline.corpus import Corpus
from data_pipeline.stream import Batch, SampleStream, StepLoader
from train.callbacks.base import Callback
from train.checkpoints.writer import CheckpointWriter, RunState
from train.config import RunConfig
from train.parallel.zero import Engine
from train.plan import Plan
from train.run_directory import EventLog, RunDirectory
from train.schedule import learning_rate


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class _Agreement:
    """Sums over ranks of one step; whether any rank was asked to stop, and whether any met a damaged shard."""

    loss: float
    gradient_norm: float
    valid_tokens: float
    stop: bool
    damage: bool


class Trainer:
    """Takes optimizer steps until the run is complete or asked to stop. What else happens is up to `callbacks`."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        engine: Engine,
        stream: SampleStream,
        evaluation_corpora: dict[str, Corpus],
        directory: RunDirectory,
        events: EventLog,
        callbacks: Sequence[Callback],
        state: RunState,
    ):
        self.config = config
        self.plan = plan
        self.engine = engine
        self.stream = stream
        self.evaluation_corpora = evaluation_corpora
        self.directory = directory
        self.events = events
        self.callbacks = list(callbacks)
        self.state = state
        self.world = engine.world
        self.total_steps = config.total_steps
        self.total_tokens = config.total_steps * config.tokens_per_step
        self._stop_reason: str | None = None
        self._stop_agreed = False
        self._writer = CheckpointWriter(
            directory.checkpoints, self.world, config.model, config.checkpoint, state.step if state.step else None
        )
        for callback in self.callbacks:
            callback.load_state_dict(state.callbacks.get(type(callback).__name__, {}))
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
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.size

    @property
    def is_main(self) -> bool:
        return self.world.is_main

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def model(self) -> torch.nn.Module:
        return self.engine.model

    @property
    def run_directory(self) -> Path:
        return self.directory.path

    def run(self) -> str:
        """Train; returns "complete", or "stopped" when asked to stop. Raises RunError when it cannot go on."""
        outcome = "failed"
        self.dispatch("on_run_start")
        loader = StepLoader(
            self.stream,
            global_batch_size=self.plan.global_batch_size,
            micro_batch_size=self.plan.micro_batch_size,
            replica=self.world.rank,
            replicas=self.world.size,
            first_sample=self.state.next_sample,
            prefetch_steps=self.config.corpus.prefetch_steps,
            workers=self.config.corpus.workers,
        )
        try:
            self.restart_clock()
            while self.step < self.total_steps and not self._stop_agreed:
                self.train_step(loader)
            outcome = "complete" if self.step >= self.total_steps else "stopped"
        finally:
            loader.close()
            with contextlib.ExitStack() as ending:
                # In reverse, and all of them even where one fails: the last checkpoint comes before everything else.
                for callback in self.callbacks:
                    ending.callback(callback.on_run_end, self, outcome)
        return outcome

    def train_step(self, loader: StepLoader) -> None:
        """One optimizer step over the global batch."""
        self.dispatch("on_step_start")
        micro_batches = self._next_micro_batches(loader)
        valid_tokens = self._count_valid_tokens(micro_batches)
        loss = self._accumulate_gradients(micro_batches, valid_tokens.clamp_min(1.0))
        gradient_norm = self.engine.gradient_norm()
        self.dispatch("on_gradients_ready")

        agreed = self._agree(loss, gradient_norm, valid_tokens)
        self.last_loss, self.last_gradient_norm = agreed.loss, agreed.gradient_norm
        if agreed.damage:
            self._report_damage()
        if not agreed.valid_tokens:
            raise RunError(
                f"step {self.step} has no target: damaged shards hold all of its samples, number "
                f"{self.state.next_sample} and the {self.plan.global_batch_size - 1} that follow. The events 'damage' "
                "say what is wrong with them; restore the corpus and start the run again"
            )
        self.last_learning_rate = learning_rate(
            self.config.schedule, self.config.optimizer.learning_rate, self.state.applied_steps, self.total_steps
        )
        applied = self.engine.step(self.last_learning_rate, self.last_gradient_norm)
        self._advance(applied)
        if agreed.stop:
            self._stop_agreed = True
            self._stop_reason = self._reason_of_any_rank()

        if self.step % self.config.logging.interval == 0 or self.step == self.total_steps:
            self._log()
        self.dispatch("on_step_end")

    def _next_micro_batches(self, loader: StepLoader) -> list[Batch]:
        started = time.perf_counter()
        micro_batches = next(loader)
        self._data_wait_seconds += time.perf_counter() - started
        return micro_batches

    def _count_valid_tokens(self, micro_batches: list[Batch]) -> torch.Tensor:
        """Targets of the global batch that are scored, fp32 scalar on the device."""
        count = sum(batch.scored_targets() for batch in micro_batches)
        total = torch.tensor(float(count), device=self.device)
        dist.all_reduce(total)
        return total

    def _accumulate_gradients(self, micro_batches: list[Batch], valid_tokens: torch.Tensor) -> torch.Tensor:
        """Gradients of the mean loss over all valid tokens of the global batch; returns this rank's part of the mean.

        DeepSpeed averages over ranks, so each rank's part is weighted by their number.
        """
        loss = torch.zeros((), device=self.device)
        for index, batch in enumerate(micro_batches):
            tokens, targets, document_start = (
                tensor.to(self.device, non_blocking=True)
                for tensor in (batch.tokens, batch.targets, batch.document_start)
            )
            scale = self.world_size / valid_tokens
            loss += self.engine.forward_backward(tokens, targets, document_start, scale) / valid_tokens
            if index < len(micro_batches) - 1:
                self.engine.end_micro_batch()
        return loss

    def _agree(self, loss: torch.Tensor, gradient_norm: torch.Tensor, valid_tokens: torch.Tensor) -> _Agreement:
        """What all ranks know of the step: its one device wait."""
        flags = [self._stop_reason is not None, bool(self.stream.damage.unreported())]
        combined = torch.cat([loss.view(1), torch.tensor(flags, dtype=loss.dtype, device=self.device)])
        dist.all_reduce(combined)
        total_loss, stop, damage, norm, valid = torch.cat(
            [combined, gradient_norm.view(1), valid_tokens.view(1)]
        ).tolist()
        return _Agreement(total_loss, norm, valid, stop > 0, damage > 0)

    def _reason_of_any_rank(self) -> str | None:
        """Why the run stops: the scheduler may have told one node only. Collective."""
        reasons: list[str | None] = [None] * self.world_size
        dist.all_gather_object(reasons, self._stop_reason)
        return next(filter(None, reasons), None)

    def _report_damage(self) -> None:
        """Make events of the damage to shards that any rank has met. Collective, on steps where there is some."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, self.stream.damage.unreported())
        first: dict[str, tuple[int, int]] = {}
        for rank, damages in enumerate(found):
            for damage in damages:
                first.setdefault(damage.problem, (rank, damage.sample))
        for problem, (rank, sample) in first.items():
            self.events.append("damage", step=self.step, rank=rank, first_sample=sample, problem=problem)
        # On all ranks: no other makes it an event again.
        self.stream.damage.mark_reported(first)

    def _advance(self, applied: bool) -> None:
        state = self.state
        if applied:
            state.applied_steps += 1
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
        if state.skipped_steps > self.config.training.max_skipped_steps:
            raise RunError(
                f"{state.skipped_steps} steps had a gradient that is not finite, more than training.max_skipped_steps="
                f"{self.config.training.max_skipped_steps}; the last at step {state.step - 1}. Lower "
                "optimizer.learning_rate or look at events.jsonl and the stability statistics"
            )

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
            "tokens_per_second_per_gpu": tokens_per_second / self.world_size,
            **self.plan.model_flops_utilisation(tokens_per_second / self.world_size),
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
        """Call one hook of every callback, in order."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    def request_stop(self, reason: str) -> None:
        """Ask this rank to stop; all ranks then stop after the same step."""
        self._stop_reason = reason

    @property
    def stop_reason(self) -> str | None:
        return self._stop_reason

    def save_checkpoint(self) -> None:
        """Start writing a checkpoint of the completed steps. Collective."""
        self.state.callbacks = {type(callback).__name__: callback.state_dict() for callback in self.callbacks}
        self.state.world_size = self.world_size
        self.state.zero_stage = self.config.parallel.zero_stage
        step = self.step

        def on_complete(folder: Path, seconds: float) -> None:
            self.events.append("save", step=step, checkpoint=folder.name, seconds=round(seconds, 3))

        self._writer.save(self.engine, self.state, on_complete)

    def finish_saving(self) -> None:
        """Wait until this rank's part of the checkpoint under way is on disk (on rank 0, until all of it is)."""
        self._writer.wait()


def _memory_gib(device: torch.device) -> float:
    """Peak device memory of this rank since its start on a GPU; resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
