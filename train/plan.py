"""What a run will do, worked out before it starts: layout, batch arithmetic, memory, FLOPs, time."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

import torch

from data_pipeline.ordering.left_out import position_after
from model.accounting import count_parameters, six_n_flops_per_token, training_flops_per_token
from model.compilation import CAPTURED, WRITTEN
from model.hardware import CPU, Hardware
from model.memory import state_bytes, states_between_chunks_bytes
from model.parts import Part
from train.checkpoints.state import TrainState
from train.config import RunConfig
from train.estimate.machine import Machine, machine_of
from train.estimate.step_time import StepSeconds, step_seconds
from train.length import steps_left
from train.optimizer import OptimizerConfig, describe_optimizer
from train.parallel.balance import (
    Accounts,
    StageCost,
    bubble,
    parts_of,
    slowest_against_mean,
    stage_costs,
    units_in_flight,
)
from train.parallel.mesh import MeshShape
from train.parallel.time_chunks import TimeChunks
from train.schedule import ScheduleConfig, describe_schedule

# The device of a plan for GPUs of a kind that is not known.
ANY_GPU = "GPU"
# Of plan.json.
FORMAT_VERSION = 1
# Dense bf16 matrix peak in FLOP/s by a part of the device's name, from the vendor's data sheets. A device that is not
# listed has no known peak, and no utilisation is computed for it.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}
# Share of the peak (6N) that `predicted_seconds` assumes; xLSTMs of 1B parameters and more reach it on an H100
# (xlstm-jax's public logs).
ASSUMED_UTILISATION = 0.35


@dataclass(frozen=True)
class Plan:
    """Numbers that follow from a configuration and the number of processes."""

    world_size: int
    # Copies of the model that take samples of their own. Each stage of one is computed by `sequence_ranks` processes,
    # with a slice of every sample each.
    replicas: int
    sequence_ranks: int
    # Of the pipeline, first to last: what each takes of a rank. One, where the whole model is on each rank.
    stages: list[StageCost]
    # Share of a step that a stage waits for others while the pipeline fills and empties, (p - 1) / (m k + p - 1), where
    # each of the m micro-batches goes in k time chunks.
    bubble: float
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    sequence_length: int
    tokens_per_step: int
    # Of the whole run: what is completed, when it resumes, and what is left.
    total_steps: int
    total_tokens: int
    # Length of the data order that the run goes through, samples that it left out included.
    total_samples: int
    # What an earlier start has done.
    completed_steps: int
    completed_tokens: int
    parameters: int
    parameter_tensors: int
    tokens_per_parameter: float
    # Training FLOPs of one token: 6N, and counted exactly (model/accounting.py).
    flops_per_token_6n: float
    flops_per_token_exact: float
    # Bytes of one rank; with a pipeline of one of the stage that takes most.
    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    # Of the pass that takes most: where statistics are recorded (logging.monitor_interval), blocks run as written.
    activation_bytes: float
    # Of these, the memory that enters each chunk of the recurrences, and the chunk of logits in work.
    chunk_state_bytes: float
    logit_bytes: float
    # Of DeepSpeed's buckets of gradients, and of weights that ZeRO-3 has gathered.
    communication_bytes: float
    # Gradients and their copies at the end of a step, when activations are gone.
    update_bytes: float
    # Memory of recorded passes (CUDA graphs), which others cannot use: beside the sum of these, where a pass with
    # statistics takes its own.
    graph_bytes: float
    # Tokens of each sample that are trained at a time; null: all. Bytes of the states between those chunks that wait in
    # the memory of the host, of a rank with a GPU; without one they are among its activations.
    time_chunk: int | None
    host_state_bytes: float
    # Bytes of what the rows of a rank carry from step to step.
    carried_bytes: float
    # Bytes of one checkpoint on disk, all ranks together.
    checkpoint_bytes: float
    # Bytes of the largest part of it that a rank copies to the memory of its host while it is saved; on the GPU a save
    # takes nothing.
    save_bytes: float
    device: str
    # Dense bf16 peak of the device in FLOP/s; null when unknown.
    peak_flops: float | None
    # What a step takes, by a calibration of the device (train/estimate); null where there is none.
    step_seconds: StepSeconds | None
    # Wall-clock of what is left of the run, by the calibration or else at ASSUMED_UTILISATION; null where neither is
    # known.
    predicted_seconds: float | None
    # As the recipe of the model and the command line gave them.
    optimizer: OptimizerConfig
    schedule: ScheduleConfig

    @property
    def steps_left(self) -> int:
        return self.total_steps - self.completed_steps

    @property
    def tokens_left(self) -> int:
        return self.total_tokens - self.completed_tokens

    @property
    def rank_bytes(self) -> float:
        """What one rank keeps in the memory that it computes in, at the peak of a step: in a pass, or at its end."""
        in_passes = self.gradient_bytes + self.activation_bytes + self.communication_bytes
        lasting = self.weight_bytes + self.optimizer_bytes + self.carried_bytes
        return lasting + max(in_passes, self.update_bytes)

    @property
    def peaks_at_the_end_of_a_step(self) -> bool:
        """Whether gradients and their copies take more than a pass does."""
        return self.update_bytes > self.gradient_bytes + self.activation_bytes + self.communication_bytes

    @property
    def tokens_per_second_per_device(self) -> float | None:
        """By the calibration."""
        if self.step_seconds is None:
            return None
        return self.tokens_per_step / self.step_seconds.total / self.world_size

    def model_flops_utilisation(self, tokens_per_second_per_device: float) -> dict[str, float | None]:
        """Share of the device's peak that the model's own FLOPs make up, by 6N and by the exact count.

        mfu = FLOPs per token * tokens per second and device / peak; recomputation does not count.
        """
        if self.peak_flops is None:
            return {"mfu_6n": None, "mfu_exact": None}
        rate = tokens_per_second_per_device / self.peak_flops
        return {"mfu_6n": self.flops_per_token_6n * rate, "mfu_exact": self.flops_per_token_exact * rate}

    @property
    def _slices(self) -> str:
        if self.sequence_ranks == 1:
            return ""
        tokens = self.sequence_length // self.sequence_ranks
        return f" of {self.sequence_ranks} sequence ranks with {tokens:,} tokens of each sample"

    @property
    def _stages(self) -> str:
        return f" of {len(self.stages)} pipeline stages" if len(self.stages) > 1 else ""

    def _describe_stages(self) -> list[str]:
        if len(self.stages) == 1:
            return []
        lines = [
            f"pipeline   {len(self.stages)} stages, {self.gradient_accumulation_steps} micro-batches"
            f"{f' of {self._chunks} time chunks' if self._chunks > 1 else ''} a step; each "
            f"stage waits {self.bubble:.1%} of the time for the first and the last ones (bubble)"
        ]
        flops = sum(stage.flops for stage in self.stages)
        for number, stage in enumerate(self.stages):
            held = ["embedding"] if number == 0 else []
            held.append(f"blocks {stage.first_block} to {stage.first_block + stage.blocks - 1}")
            held += ["norm and head"] if number == len(self.stages) - 1 else []
            share = f"{stage.flops / flops:.1%} of the FLOPs, {gib(stage.bytes)} a rank"
            lines.append(f"{'':11}stage {number}: {', '.join(held)}: {share}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def describe(self) -> str:
        """The plan as the lines that a run prints at its start."""
        at_the_end = self.peaks_at_the_end_of_a_step
        lines = [
            f"model      {self.parameters:,} parameters in {self.parameter_tensors} tensors",
            f"layout     {self.world_size} x {self.device}, {self.replicas} replicas{self._stages}{self._slices}",
            *self._describe_stages(),
            f"batch      {self.global_batch_size} samples x {self.sequence_length} tokens = {self.tokens_per_step:,} "
            f"tokens a step; {self.gradient_accumulation_steps} micro-batches of {self.micro_batch_size} a rank",
            *self._describe_chunks(),
            self._describe_length(),
            f"optimizer  {describe_optimizer(self.optimizer)}",
            f"schedule   {describe_schedule(self.schedule, self.total_steps)}",
            f"compute    {self.flops_per_token_6n:.3g} FLOPs a token (6N), {self.flops_per_token_exact:.3g} exactly",
            f"memory     {gib(self.rank_bytes)} a rank: weights {gib(self.weight_bytes)}, "
            f"gradients {gib(self.gradient_bytes)}, optimizer {gib(self.optimizer_bytes)}, "
            f"activations {gib(self.activation_bytes)}"
            + (f", communication {gib(self.communication_bytes)}" if self.communication_bytes else "")
            + (f", carried state {gib(self.carried_bytes)}" if self.carried_bytes else "")
            + (f"; its gradients with copies at the end of a step {gib(self.update_bytes)}" if at_the_end else ""),
            f"checkpoint {gib(self.checkpoint_bytes)}",
        ]
        left = " left" if self.completed_steps else ""
        if self.predicted_seconds is not None and self.step_seconds is not None:
            hours, seconds = self.predicted_seconds / 3600, self.step_seconds.total
            lines.append(
                f"time       about {hours:.1f} h{left}, {seconds:.3f} s a step, "
                f"{self.tokens_per_second_per_device:,.0f} tokens/s a GPU (see python -m launch plan)"
            )
        elif self.predicted_seconds is not None and self.peak_flops is not None:
            lines.append(
                f"time       about {self.predicted_seconds / 3600:.1f} h{left} at {ASSUMED_UTILISATION:.0%} of "
                f"{self.peak_flops / 1e12:.0f} TFLOP/s"
            )
        return "\n".join(lines)

    def _describe_chunks(self) -> list[str]:
        if self.time_chunk is None:
            return []
        if len(self.stages) > 1:
            kept = units_in_flight(len(self.stages), 0, self.gradient_accumulation_steps, self._chunks)
            rest = f"the first stage keeps up to {kept} of them"
        else:
            rest = f"{gib(self.host_state_bytes)} of states in host memory"
        return [f"chunks     {self._chunks} time chunks of {self.time_chunk:,} tokens; {rest}"]

    @property
    def _chunks(self) -> int:
        return TimeChunks(self.time_chunk).count(self.sequence_length)

    def _describe_length(self) -> str:
        whole = (
            f"{self.total_steps:,} steps, {self.total_tokens:,} tokens ({self.tokens_per_parameter:.1f} a parameter)"
        )
        if not self.completed_steps:
            return f"length     {whole}"
        return f"left       {self.steps_left:,} steps, {self.tokens_left:,} tokens, of {whole}"


def make_plan(
    config: RunConfig,
    world_size: int,
    device: str | None = None,
    state: TrainState | None = None,
    machine: Machine | None = None,
) -> Plan:
    """Work out the plan of a valid `config`.

    `device`: the accelerator's name; None: this machine's. `state`: what the run goes on from; None when it begins.
    `machine`: calibrated GPUs that compute the run, in the place of `device`; None: those of that name, if they are
    calibrated.
    """
    device = machine.device if machine is not None else device
    state = state or TrainState()
    device = device or _device_name()
    training = config.training
    counted = count_parameters(config.model)
    left = steps_left(config, state)
    tokens_left = left * config.tokens_per_step
    total_tokens = state.tokens + tokens_left
    shape = MeshShape.of_world(world_size, config.parallel.pipeline, config.parallel.sequence)
    compute_bytes = config.precision.compute_dtype.itemsize
    hardware = Hardware(device, compute_bytes)
    stages = stage_costs(config, shape, _at_its_peak(config, hardware, left))
    largest = max(stages, key=lambda stage: stage.bytes)
    micro_batches = training.global_batch_size // (training.micro_batch_size * shape.data)
    six_n = six_n_flops_per_token(config.model)
    between_chunks = 0.0
    if shape.pipeline == 1:
        between_chunks = states_between_chunks_bytes(
            config.model, training.micro_batch_size, training.sequence_length, training.time_chunk, compute_bytes
        )
    # Of one row.
    carried = state_bytes(config.model, cache_dtype_bytes=compute_bytes) if training.carry_state else 0
    on_host = between_chunks if device != CPU else 0.0
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
    chunks = TimeChunks(training.time_chunk).count(training.sequence_length)
    waiting = bubble(shape.pipeline, micro_batches, chunks)
    seconds = None
    if machine is None and config.precision.is_bf16:
        # Products of calibrations are those of bf16.
        machine = machine_of(device, world_size)
    step = None if machine is None else step_seconds(config, shape, machine, parts_of(config, stages))
    if step is not None:
        seconds = step.total * left
    elif peak is not None:
        seconds = six_n * tokens_left / (peak * ASSUMED_UTILISATION * world_size)
        seconds *= slowest_against_mean(stages) / (1 - waiting)
    return Plan(
        world_size=world_size,
        replicas=shape.data,
        sequence_ranks=shape.sequence,
        stages=stages,
        bubble=waiting,
        micro_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=micro_batches,
        global_batch_size=training.global_batch_size,
        sequence_length=training.sequence_length,
        tokens_per_step=config.tokens_per_step,
        total_steps=state.step + left,
        total_tokens=total_tokens,
        total_samples=position_after(state.next_sample, left, training.global_batch_size, config.left_out),
        completed_steps=state.step,
        completed_tokens=state.tokens,
        parameters=counted.total,
        parameter_tensors=counted.tensors,
        tokens_per_parameter=total_tokens / counted.total,
        flops_per_token_6n=six_n,
        flops_per_token_exact=training_flops_per_token(config.model, training.sequence_length, hardware),
        weight_bytes=largest.weight_bytes,
        gradient_bytes=largest.gradient_bytes,
        optimizer_bytes=largest.optimizer_bytes,
        activation_bytes=largest.activation_bytes + (between_chunks - on_host),
        chunk_state_bytes=largest.chunk_state_bytes,
        logit_bytes=largest.logit_bytes,
        communication_bytes=largest.communication_bytes,
        update_bytes=largest.update_bytes,
        graph_bytes=_graph_bytes(config, shape, hardware, left),
        time_chunk=training.time_chunk,
        host_state_bytes=on_host,
        carried_bytes=float(carried * training.global_batch_size // shape.data),
        # fp32 weights and two fp32 moments.
        checkpoint_bytes=12.0 * counted.total + carried * training.global_batch_size,
        save_bytes=_save_bytes(config, shape, parts_of(config, stages)),
        device=device,
        peak_flops=peak,
        step_seconds=step,
        predicted_seconds=seconds,
        optimizer=config.optimizer,
        schedule=config.schedule,
    )


def _records_statistics(config: RunConfig, steps: int) -> bool:
    return 0 < config.logging.monitor_interval <= steps


def _at_its_peak(config: RunConfig, hardware: Hardware, steps: int) -> Hardware:
    """Where blocks run as they do in the pass that keeps most: in one with statistics as written."""
    execution = config.execution("cpu" if hardware.device_name == CPU else "cuda")
    return dataclasses.replace(hardware, compiles=execution != WRITTEN and not _records_statistics(config, steps))


def _graph_bytes(config: RunConfig, shape: MeshShape, hardware: Hardware, steps: int) -> float:
    """What recorded passes hold on to while a pass with statistics runs beside them."""
    if hardware.device_name == CPU or config.execution("cuda") != CAPTURED or not _records_statistics(config, steps):
        return 0.0
    compiled = Accounts(config, shape, dataclasses.replace(hardware, compiles=True))
    return compiled.activations(Part(range(config.model.n_blocks)), 1).total


def _save_bytes(config: RunConfig, shape: MeshShape, parts: list[Part]) -> float:
    """fp32 weights and moments; those of a rank that owns whole parameters, where nothing is cut."""
    largest = max(count_parameters(config.model, part).total for part in parts)
    return 12.0 * largest / (shape.data * shape.sequence if config.parallel.zero_stage else 1)


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else CPU


def gib(count: float) -> str:
    """A number of bytes for a reader."""
    return f"{count / 2**30:.2f} GiB"
