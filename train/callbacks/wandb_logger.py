"""Weights & Biases: the run's metrics under one run id, however often the run is resumed."""

from __future__ import annotations

import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.passwords import without_passwords
from model.statistics import HISTOGRAM_EDGES
from train.callbacks.base import Callback
from train.decisions import CONTINUE, Decision, Rollback
from train.health.record import health_figures
from train.origin import read_ancestry
from train.run_directory import write_atomically
from train.stored_configuration import as_json
from train.wandb_settings import reach_seconds, wandb_mode

if TYPE_CHECKING:
    from train.callbacks.alerts import Alert
    from train.callbacks.samples import Sample
    from train.evaluate import EvaluationResult
    from train.trainer import Trainer

ID_FILE = "wandb_id.txt"
# W&B draws no open bins: the outer ones as wide as the others.
_HISTOGRAM_BORDERS = (
    2 * HISTOGRAM_EDGES[0] - HISTOGRAM_EDGES[1],
    *HISTOGRAM_EDGES,
    2 * HISTOGRAM_EDGES[-1] - HISTOGRAM_EDGES[-2],
)


class WandbLogger(Callback):
    """Logs on rank 0, in the mode that `wandb_mode` finds; offline where the server is not reached at the start.

    Files lie in <run>/wandb; `wandb sync <run>/wandb/offline-run-*` uploads those of an offline run.
    """

    def __init__(self) -> None:
        self._id: str | None = None
        self._run: Any = None
        self._offline = False
        # Statistics have names by which W&B puts those of a layer into a section of their own. Not in runs that began
        # before there were such names: theirs go on.
        self._has_sections = True
        # Rows beyond the number of steps: those of steps that a rollback gave up. Not less for a rollback.
        self._rows_ahead = 0

    def on_run_start(self, trainer: Trainer) -> None:
        settings = trainer.config.logging.wandb
        mode = wandb_mode(settings, os.environ)
        if not trainer.is_main or mode == "disabled":
            return
        import wandb

        self._offline = mode == "offline"
        self._id = self._find_id(Path(trainer.run_directory), trainer.config.resume_from is not None)
        started = time.monotonic()
        try:
            self._run = self._start(trainer)
        # W&B hands on TimeoutError where its own process does not keep the limit.
        except (wandb.errors.Error, TimeoutError) as error:
            if not _was_not_reached(error, time.monotonic() - started):
                raise ValueError(
                    f"logging.wandb.mode: W&B cannot start in mode '{mode}' ({error}); correct WANDB_API_KEY or the "
                    "network, or set logging.wandb.mode=offline"
                ) from error
            self._go_offline(trainer, " ".join(str(error).split()))
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _start(self, trainer: Trainer) -> Any:
        import wandb

        settings = trainer.config.logging.wandb
        known = wandb.Settings(silent=True, console="off", init_timeout=reach_seconds(os.environ))
        if without_passwords(sys.argv) != sys.argv:
            # With what the machine is, W&B would keep the command line.
            known.x_disable_machine_info = True
        return wandb.init(
            project=settings.project,
            entity=settings.entity,
            tags=list(settings.tags),
            name=trainer.config.name,
            id=self._id,
            # An offline run cannot ask the server for its past; the id alone ties its parts together.
            resume=None if self._offline else "allow",
            mode="offline" if self._offline else "online",
            dir=str(trainer.run_directory),
            config={**as_json(trainer.config), "ancestry": read_ancestry(Path(trainer.run_directory))},
            settings=known,
        )

    def _go_offline(self, trainer: Trainer, reason: str) -> None:
        """Start again without the server, which was not reached."""
        import wandb

        # The process that W&B keeps beside this one holds on to the id until it ends.
        wandb.teardown()
        self._offline = True
        self._run = self._start(trainer)
        trainer.events.append("wandb_offline", step=trainer.step, reason=reason)
        print(
            f"W&B was not reached ({reason}); the run goes on offline. To send its figures later: "
            f"wandb sync {Path(trainer.run_directory) / 'wandb'}/offline-run-*",
            file=sys.stderr,
            flush=True,
        )

    def on_metrics(self, trainer: Trainer, record: dict[str, Any]) -> Decision:
        figures = {key: value for key, value in record.items() if key not in ("kind", "step") and value is not None}
        self._log(trainer, {f"train/{key}": value for key, value in figures.items()})
        return CONTINUE

    def on_statistics(self, trainer: Trainer, values: dict[str, float]) -> Decision:
        names = {name: panel_name(name) if self._has_sections else f"statistics/{name}" for name in values}
        self._log(trainer, {names[name]: value for name, value in values.items()})
        return CONTINUE

    def on_profiles(self, trainer: Trainer, profiles: dict[str, list[float]]) -> None:
        if self._run is None:
            return
        import wandb

        shown: dict[str, Any] = {}
        for name, numbers in profiles.items():
            panel = panel_name(name) if self._has_sections else f"statistics/{name}"
            measured = [number for number in numbers if math.isfinite(number)]
            if name.endswith("_histogram") and measured:
                shown[panel] = wandb.Histogram(np_histogram=(np.array(numbers), np.array(_HISTOGRAM_BORDERS)))
            elif measured:
                shown[panel] = wandb.Histogram(measured)
        self._log(trainer, shown)

    def on_evaluation(self, trainer: Trainer, results: dict[str, EvaluationResult]) -> Decision:
        figures: dict[str, float] = {}
        for name, result in results.items():
            figures |= {f"evaluation/{name}/loss": result.loss, f"evaluation/{name}/perplexity": result.perplexity}
        self._log(trainer, figures)
        return CONTINUE

    def on_health(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self._log(trainer, health_figures(record))

    def on_alert(self, trainer: Trainer, alert: Alert) -> None:
        if self._run is not None:
            self._run.alert(
                title=f"{trainer.config.name}: {alert.rule}", text=without_passwords(alert.words), level="WARN"
            )

    def on_samples(self, trainer: Trainer, samples: Sequence[Sample]) -> None:
        if self._run is not None:
            import wandb

            rows = [[trainer.step, sample.prompt, sample.text] for sample in samples]
            self._log(trainer, {"samples": wandb.Table(columns=["step", "prompt", "text"], data=rows)})

    def on_rollback(self, trainer: Trainer, rollback: Rollback, left: int) -> None:
        self._rows_ahead += left - trainer.step
        self._log(trainer, {"rollback/from_step": left, "rollback/skipped_steps": rollback.skip})

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        if self._run is not None:
            self._try(self._run.finish, exit_code=1 if outcome == "failed" else 0)
            self._run = None

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id, "rows_ahead": self._rows_ahead, "has_sections": self._has_sections}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._id = state.get("id", self._id)
        self._has_sections = state.get("has_sections", not state)
        self._rows_ahead = max(self._rows_ahead, state.get("rows_ahead", 0))

    def _find_id(self, run_directory: Path, is_branch: bool = False) -> str:
        """The id of this run: from its folder, else from the checkpoint, else a new one, kept in the folder."""
        path = run_directory / ID_FILE
        if path.is_file() and (kept := path.read_text(encoding="utf-8").strip()):
            return kept
        # The first checkpoint of a branch has the id of its parent.
        new = secrets.token_hex(4) if is_branch else self._id or secrets.token_hex(4)
        write_atomically(path, new + "\n")
        return new

    def _log(self, trainer: Trainer, figures: dict[str, Any]) -> None:
        if self._run is None:
            return
        # Online, W&B goes on counting rows where the server's history ends and refuses smaller numbers: a resumed run
        # that repeats steps must not name them. Offline it would count from 0 again and collide with the earlier part.
        step = trainer.step + self._rows_ahead if self._offline else None
        self._try(self._run.log, {"step": trainer.step, **figures}, step=step)

    def _try(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Call W&B, and do without it from the first failure on: it may not end a run that has begun."""
        try:
            call(*arguments, **options)
        # W&B hands on whatever its service process or the network raised: ConnectionResetError, TimeoutError, its own.
        except Exception as error:
            self._run = None
            print(
                f"W&B has failed ({type(error).__name__}: {error}); the run goes on without it, metrics.jsonl has "
                "every figure",
                file=sys.stderr,
                flush=True,
            )


def panel_name(statistic: str) -> str:
    """The name of a statistic at W&B, which makes a section of what stands before the first slash: blocks.03 for all
    panels of that block."""
    parts = statistic.split(".")
    if parts[0] != "blocks":
        return f"statistics/{statistic}"
    return f"{'.'.join(parts[:2])}/{'.'.join(parts[2:])}"


def _was_not_reached(error: Exception, seconds: float) -> bool:
    """Whether W&B's server gave no answer, rather than one that refuses the run. `seconds`: the start has taken."""
    import wandb

    if isinstance(error, wandb.errors.AuthenticationError):
        return False
    if not isinstance(error, wandb.errors.CommError | TimeoutError):
        return False
    # W&B repeats a request without an answer until its time is over. Go's words for a connection that cannot be made.
    return seconds >= reach_seconds(os.environ) or "dial tcp" in str(error)
