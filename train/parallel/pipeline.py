"""The engine of pipeline stages: each rank computes a range of blocks, on DeepSpeed's PipelineModule with ZeRO 0 or 1.

Of DeepSpeed's engine we use the instructions (receive, compute, send, reduce), in the order of our schedule
(train/parallel/pipeline_schedule.py), whose units are the time chunks of micro-batches. We do not use what stands
around them, which would take the numbers of the run out of our hands:

- Its `train_batch` steps the optimizer at once. Ours ends before: clipping, skipping and monitors come in between.
- Its loss is a mean over micro-batches, which weighs tokens unequally where targets are masked; and it is broadcast.
- It clips by the gradients of the first stage alone in fp32 without ZeRO (release 0.19.8). We clip, over all stages.
- It reads data on the first and the last stage only, but every stage needs to know where documents start. The trainer
  gives every stage its micro-batches, so nothing but hidden states passes between stages.
- It steps both copies of a tied weight, whose rounding drifts apart, and fails on a stage that has no other weight.
  Here one copy is stepped (train/parallel/tied_weight.py).
- Its checkpoints are those of one layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.schedule import BackwardPass, InferenceSchedule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor, nn

from data_pipeline.reading.batch import Batch
from model.stages import Stage
from train.config import RunConfig
from train.parallel.balance import parts_of
from train.parallel.mesh import Mesh
from train.parallel.pipeline_schedule import UnitSchedule
from train.parallel.stage_layer import StageLayer, Unit, units_of
from train.parallel.tied_weight import TiedWeight
from train.parallel.zero import ZeroEngine
from train.parallel.zero_fragments import accumulated_gradient
from train.plan import Plan
from train.watch.whereabouts import EVALUATE, FORWARD_AND_BACKWARD


class PipelineEngine(ZeroEngine):
    """`train.parallel.engine.Engine` for one stage of several; over the ranks of the stage, ZeRO 0 or 1 as without."""

    def __init__(self, config: RunConfig, plan: Plan, mesh: Mesh):
        # Among stages, before any two of them exchange: NCCL wants all ranks of a group in its first operation.
        mesh.sum(torch.zeros((), device=mesh.device), group="pipeline")
        self._parts = parts_of(config, plan.stages)
        super().__init__(config, plan, mesh)
        self._deepspeed._INSTRUCTION_MAP = {**self._deepspeed._INSTRUCTION_MAP, BackwardPass: _backward_pass}
        # Of what passes between stages.
        self._batch_shape: torch.Size | None = None

    def _make_model(self, config: RunConfig) -> Stage:
        return Stage(config.model, self._parts[self.mesh.pipeline])

    def _make_module(self, config: RunConfig) -> nn.Module:
        self._tied = TiedWeight(self.mesh, self.model)
        self._layer = StageLayer(self.model, config.training.z_loss_weight, self._compute_context)
        # DeepSpeed builds the layers of its own stage alone.
        layers = [
            self._layer if stage == self.mesh.pipeline else LayerSpec(nn.Identity) for stage in range(len(self._parts))
        ]
        topology = PipeDataParallelTopology(len(layers), self.mesh.size_of("data_and_sequence"))
        return PipelineModule(layers, topology=topology, partition_method="uniform")

    def _trained_parameters(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        named = super()._trained_parameters(module)
        return [(name, parameter) for name, parameter in named if parameter is not self._tied.copy]

    def train_batch(self, micro_batches: Sequence[Batch], valid_tokens: Tensor) -> Tensor:
        """See `Engine.train_batch`. Stages but the last have no part of the loss."""
        engine = self._deepspeed
        # DeepSpeed averages over the ranks of a stage and over units, which it takes for micro-batches.
        averaged = self.mesh.size_of("data_and_sequence") * engine.gradient_accumulation_steps()
        chunks = self._begin(micro_batches, averaged / valid_tokens)
        engine._exec_schedule(UnitSchedule(len(micro_batches), chunks, engine.num_stages, engine.stage_id))
        self._tied.add_gradients(lambda weight: accumulated_gradient(engine, weight))
        engine._exec_reduce_grads()
        if engine.total_loss is None:
            return torch.zeros((), device=self.mesh.device)
        loss: Tensor = engine.total_loss / averaged
        return loss

    def evaluate_batch(self, batch: Batch) -> tuple[float, int]:
        """See `Engine.evaluate_batch`. Stages but the last have no part of it, and go on before it is computed."""
        engine = self._deepspeed
        engine.module.eval()
        try:
            with torch.no_grad():
                chunks = self._begin([batch], torch.ones((), device=self.mesh.device))
                engine._exec_schedule(InferenceSchedule(chunks, engine.num_stages, engine.stage_id))
        finally:
            engine.module.train()
        if not self.model.part.head:
            return 0.0, 0
        return float(engine.total_loss), batch.scored_targets()

    def _begin(self, batches: Sequence[Batch], loss_scale: Tensor) -> int:
        """Let the next schedule compute these batches; returns the time chunks of each."""
        engine = self._deepspeed
        shape = batches[0].tokens.shape
        chunks = self._time_chunks.ranges(shape[1])
        if shape != self._batch_shape:
            # Stages tell each other the new shape with the first tensor; with each one where the last chunk is shorter.
            engine.reset_activation_shape()
            engine.dynamic_shape = len({chunk.stop - chunk.start for chunk in chunks}) > 1
            self._batch_shape = shape
        engine.total_loss, engine._compute_loss = None, True
        engine.set_dataiterator((batch.tokens[:, chunk], ()) for batch in batches for chunk in chunks)
        self._layer.units = map(self._begun, units_of(batches, chunks, loss_scale, self.mesh.device))
        return len(chunks)

    def _begun(self, unit: Unit) -> Unit:
        """`unit`, whose forward pass begins."""
        self.mesh.whereabouts.enter(FORWARD_AND_BACKWARD if torch.is_grad_enabled() else EVALUATE)
        return unit

    def _take_step(self) -> None:
        self._deepspeed._exec_optimizer_step()
        self._tied.send_weight()


def _backward_pass(engine: Any, buffer_id: int) -> None:
    """DeepSpeed's, of this unit also on the last stage: there DeepSpeed takes the loss that was computed last."""
    outputs = engine.pipe_buffers["outputs"]
    if engine.is_last_stage():
        engine.loss, outputs[buffer_id] = outputs[buffer_id], None
    engine._exec_backward_pass(buffer_id)
    # DeepSpeed would keep what the graph holds until the next loss.
    engine.loss = None
