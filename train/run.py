"""One run from its configuration to its end."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from conf import ConfigError
from conf.lasting_output import LastingOutput, lasting_output
from data_pipeline.errors import DataError
from model.weights import WeightsError
from train.callbacks.alerts import Alerts
from train.callbacks.bad_steps import BadSteps
from train.callbacks.base import Callback
from train.callbacks.checkpointing import Checkpointing
from train.callbacks.csv_tables import CsvTables
from train.callbacks.evaluation import Evaluation
from train.callbacks.health import Health
from train.callbacks.metrics_file import MetricsFile
from train.callbacks.preemption import Preemption
from train.callbacks.progress import Progress
from train.callbacks.samples import Samples
from train.callbacks.stability import Stability
from train.callbacks.tensorboard_logger import TensorBoardLogger
from train.callbacks.wandb_logger import WandbLogger
from train.callbacks.weight_comparison import WeightComparison
from train.checkpoints.layout import CheckpointError
from train.config import RunConfig
from train.context import RunContext, open_run
from train.errors import RunError, last_words
from train.evaluate import open_sets
from train.kernel_check import check_kernels
from train.mirroring import bring_last_to_mirror
from train.next_commands import next_commands
from train.out_of_memory import explained
from train.parallel.engine import EngineFactory, make_engine
from train.plan import Plan
from train.restore import restore
from train.trainer import Trainer


def train(config: RunConfig, callbacks: Sequence[Callback] = (), factory: EngineFactory = make_engine) -> int:
    """Run or resume; returns the process's exit code: 0 complete or stopped on request, 1 failed.

    Where it fails it says why on standard error, and in the run's events where there is a folder. Afterwards the
    process is as it was before: no lock, process group, log file or signal handler is left. Only where the run has
    several processes and one of them fails is its process group left; that process should end, and with it the others.

    `callbacks`: more of them, behind those that watch the run and before those that evaluate and save. `factory`: what
    makes the engine.
    Raises ConfigError for a configuration that cannot work.
    """
    with lasting_output() as output:
        return _reporting_errors(config, callbacks, factory, output)


def _reporting_errors(
    config: RunConfig, callbacks: Sequence[Callback], factory: EngineFactory, output: LastingOutput
) -> int:
    try:
        with open_run(config, make_callbacks(config, callbacks), output) as context:
            return _train(context, factory)
    except (DataError, CheckpointError, WeightsError, RunError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        print(last_words(error), file=sys.stderr, flush=True)
        return 1


def _train(context: RunContext, factory: EngineFactory) -> int:
    config, events = context.config, context.events
    if context.is_complete:
        plan = context.plan
        context.say(
            f"The run '{config.name}' is complete: {plan.total_steps} steps, {plan.total_tokens:,} tokens in "
            f"{context.directory.path}. To go on, make it longer, such as by {_twice_as_long(config, plan)}."
        )
        context.say(next_commands(config, context.directory, is_complete=True))
        bring_last_to_mirror(context)
        return 0
    check_kernels(config, context.mesh, events)
    with explained(config, context.plan):
        return _train_steps(context, factory)


def _train_steps(context: RunContext, factory: EngineFactory) -> int:
    config, events = context.config, context.events
    state = restore(context, factory)
    for name, windows in open_sets(config, context.evaluation_corpora).items():
        events.append("evaluation_set", set=name, fingerprint=windows.fingerprint, tokens=windows.targets)
    trainer = Trainer(context, state)
    outcome = trainer.run()
    events.append(outcome if outcome == "complete" else "stop", step=trainer.step, reason=trainer.stop_reason)
    if outcome == "stopped":
        context.say(f"Stopped by {trainer.stop_reason} after step {trainer.step}; the same command resumes.")
    else:
        context.say(f"Complete: {trainer.step:,} steps, {trainer.tokens:,} tokens.")
    context.say(next_commands(config, context.directory, is_complete=outcome != "stopped"))
    return 0


def _twice_as_long(config: RunConfig, plan: Plan) -> str:
    """The setting that makes a complete run twice as long as it is, in the unit of its configuration."""
    if config.training.total_tokens is None:
        return f"training.total_steps={2 * plan.completed_steps}"
    return f"training.total_tokens={2 * plan.completed_tokens}"


def make_callbacks(config: RunConfig, more: Sequence[Callback] = ()) -> list[Callback]:
    """Every concern of a run beside the training step, in the order in which its hooks run (on_run_end: in reverse)."""
    callbacks: list[Callback] = [Stability(), BadSteps(), MetricsFile(), WandbLogger(), Alerts(), Health()]
    # Behind the file that it is made from.
    if config.logging.csv:
        callbacks.append(CsvTables())
    if config.logging.tensorboard:
        callbacks.append(TensorBoardLogger())
    if config.logging.progress:
        callbacks.append(Progress())
    sampling = [Samples()] if config.logging.samples.interval else []
    return [*callbacks, *more, Preemption(), WeightComparison(), Evaluation(), *sampling, Checkpointing()]
