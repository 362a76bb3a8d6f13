"""What a person watching the run wants to know: step, loss, tokens per second, time left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from train.callbacks.base import Callback
from train.decisions import CONTINUE, Decision, Rollback

if TYPE_CHECKING:
    from train.callbacks.samples import Sample
    from train.evaluate import EvaluationResult
    from train.trainer import Trainer

_SHOWN_OF_SAMPLES = 300
# At 80 columns all of it fits. Narrower terminals cut off the end, and the loss stands in the lines above.
_BAR_FORMAT = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}  {remaining} left{postfix}"


class Progress(Callback):
    """One plain line for each logged step on rank 0's standard error, and where that is a terminal a bar below them."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """`stream`: where to write; standard error by default."""
        self._stream = stream
        self._bar: tqdm[Any] | None = None

    def on_run_start(self, trainer: Trainer) -> None:
        self._stream = self._stream or sys.stderr
        if trainer.is_main and self._stream.isatty():
            self._bar = tqdm(
                total=trainer.total_steps,
                initial=trainer.step,
                bar_format=_BAR_FORMAT,
                dynamic_ncols=True,
                smoothing=0.05,
                file=self._stream,
            )

    def on_step_end(self, trainer: Trainer) -> Decision:
        self._leave_lost_terminal()
        if self._bar is not None:
            self._bar.update(trainer.step - self._bar.n)
        return CONTINUE

    def on_metrics(self, trainer: Trainer, record: dict[str, Any]) -> Decision:
        loss, speed = f"loss {record['loss']:.4f}", f"{record['tokens_per_second']:,.0f} tokens/s"
        self._leave_lost_terminal()
        if self._bar is not None:
            self._bar.set_postfix_str(f"{speed}, {loss}", refresh=False)
        if trainer.is_main:
            left = _duration((trainer.total_steps - trainer.step) * record["step_seconds"])
            self._write(f"step {trainer.step}/{trainer.total_steps}  {loss}  {speed}  {left} left")
        return CONTINUE

    def on_evaluation(self, trainer: Trainer, results: dict[str, EvaluationResult]) -> Decision:
        if trainer.is_main:
            for name, result in results.items():
                self._write(
                    f"step {trainer.step}/{trainer.total_steps}  held-out {name}: loss {result.loss:.4f}, "
                    f"perplexity {result.perplexity:,.2f} over {result.tokens:,} tokens"
                )
        return CONTINUE

    def on_samples(self, trainer: Trainer, samples: Sequence[Sample]) -> None:
        for sample in samples:
            # One line, and not more of it than a terminal shows in a few.
            text = " ".join((sample.prompt + sample.text).split())
            self._write(f"step {trainer.step}/{trainer.total_steps}  sample: {text[:_SHOWN_OF_SAMPLES]}")

    def on_rollback(self, trainer: Trainer, rollback: Rollback, left: int) -> None:
        if self._bar is not None:
            self._bar.n = trainer.step
            # Of a run in tokens: steps that are taken again may have another batch than the first time.
            self._bar.total = trainer.total_steps
            self._bar.refresh()
        if trainer.is_main:
            self._write(
                f"step {left}/{trainer.total_steps}  back to step {trainer.step}, leaving out the samples of "
                f"{rollback.skip} steps"
            )

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _leave_lost_terminal(self) -> None:
        """Where the terminal is gone (`conf.lasting_output`) a log file gets the lines alone."""
        if self._bar is not None and self._stream is not None and not self._stream.isatty():
            self._bar.disable = True
            self._bar = None

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    """Two units of a length of time: 45s, 3m 20s, 2h 05m, 4d 07h."""
    seconds = round(seconds)
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds % 60:02d}s" if minutes else f"{seconds}s"
