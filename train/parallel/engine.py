"""What the trainer asks of an engine, and the choice of one.

An engine holds one rank's share of the model, its optimizer and its gradients. The trainer, evaluation, checkpoints and
callbacks use this protocol alone; they cannot tell one engine from another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from data_pipeline.reading.batch import Batch
from train.config import RunConfig
from train.parallel.carried_state import CarriedState
from train.parallel.fragments import Fragment, ReadRange
from train.parallel.mesh import Mesh
from train.plan import Plan


class Engine(Protocol):
    """One rank's share of the model, its optimizer and its gradients.

    A step is `train_batch`, `gradient_norm`, `step`, in this order; between the last two the gradients of `fragments`
    can be read. All but `fragments`, `model`, `whole_weights` and `describe` are collective: every rank calls them in
    the same order.
    """

    @property
    def mesh(self) -> Mesh: ...

    @property
    def model(self) -> nn.Module:
        """The modules that this rank computes, for monitors; parameters have the whole model's names."""

    @property
    def fragments(self) -> Sequence[Fragment]:
        """Every part of a parameter that this rank holds, in the order of the model's parameters.

        Over all ranks, the owned ones cover every parameter exactly once.
        """

    def whole_weights(self) -> dict[str, Tensor]:
        """Weights as the forward pass reads them, by name, of the parameters that this rank holds whole between steps.
        All ranks that hold one hold the same bits."""

    @property
    def carried(self) -> CarriedState | None:
        """What the rows of the batch carry from step to step; None: they begin empty, whatever came before."""

    def train_batch(self, micro_batches: Sequence[Batch], valid_tokens: Tensor) -> Tensor:
        """Forward and backward of this rank's part of the global batch.

        Args:
            micro_batches: on the host.
            valid_tokens: scored targets of the global batch, fp32 scalar on the device, at least 1.

        What the rows carry goes on by one window.

        Returns:
            This rank's part of the mean loss over all valid tokens, fp32 scalar on the device: the parts of all ranks
            of `world` add up to the mean. The gradients of `fragments` are those of that mean.
        """

    def evaluate_batch(self, batch: Batch) -> tuple[float, int]:
        """(sum of the losses in nats, scored targets) of this rank's part of a batch, without gradients. Its rows begin
        empty."""

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients, fp32 scalar on the device, equal on all ranks; NaN or inf if any is."""

    def step(self, learning_rate: float, gradient_norm: float) -> bool:
        """Clip, then apply one optimizer step at `learning_rate`.

        Returns False when the step was skipped because `gradient_norm` is not finite: weights, moments and step counts
        are then as before, and rows that carry what is not finite are emptied. The gradients are dropped either way.
        """

    def fill(self, read: ReadRange, completed_steps: int) -> None:
        """Set all weights of this rank from `read`, the moments to zero and AdamW's step count to `completed_steps`.

        Reads no more than this rank holds in one form or another, one parameter at a time. The moments of a checkpoint
        are then copied into those of `fragments`.
        """

    def describe(self) -> dict[str, Any]:
        """The settings that this engine derived from the configuration, as JSON values; saved as deepspeed.json."""

    def close(self) -> None:
        """Let go of memory and process groups; nothing else works afterwards."""


class EngineFactory(Protocol):
    """Makes an engine whose weights hold no values yet: `Engine.fill` comes next."""

    def __call__(self, config: RunConfig, plan: Plan, mesh: Mesh) -> Engine: ...


def make_engine(config: RunConfig, plan: Plan, mesh: Mesh) -> Engine:
    """The engine that lays the run out as `config.parallel` says."""
    # Importing DeepSpeed takes seconds, and those who only need the protocol do without.
    from train.parallel.zero import ZeroEngine

    if mesh.shape.pipeline > 1:
        from train.parallel.pipeline import PipelineEngine

        return PipelineEngine(config, plan, mesh)
    return ZeroEngine(config, plan, mesh)
