"""What a run will do, worked out before it starts: layout, batch arithmetic, memory, FLOPs, time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from model.accounting import count_parameters, six_n_flops_per_token, training_flops_per_token
from model.hardware import Hardware
from model.memory import activation_bytes, training_state_bytes
from train.config import RunConfig
from train.parallel.mesh import MeshShape

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
    # Data-parallel copies of the model; sequence and pipeline parallelism will divide the world further.
    replicas: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    sequence_length: int
    tokens_per_step: int
    total_steps: int
    total_tokens: int
    parameters: int
    parameter_tensors: int
    tokens_per_parameter: float
    # Training FLOPs of one token: 6N, and counted exactly (model/accounting.py).
    flops_per_token_6n: float
    flops_per_token_exact: float
    # Bytes of one rank.
    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    activation_bytes: float
    # Bytes of one checkpoint on disk, all ranks together.
    checkpoint_bytes: float
    device: str
    # Dense bf16 peak of the device in FLOP/s; null when unknown.
    peak_flops: float | None
    # Wall-clock of the run at ASSUMED_UTILISATION; null when the peak is unknown.
    predicted_seconds: float | None

    @property
    def rank_bytes(self) -> float:
        """What one rank keeps in the memory that it computes in, at the peak of a step."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    def model_flops_utilisation(self, tokens_per_second_per_device: float) -> dict[str, float | None]:
        """Share of the device's peak that the model's own FLOPs make up, by 6N and by the exact count.

        mfu = FLOPs per token * tokens per second and device / peak; recomputation does not count.
        """
        if self.peak_flops is None:
            return {"mfu_6n": None, "mfu_exact": None}
        rate = tokens_per_second_per_device / self.peak_flops
        return {"mfu_6n": self.flops_per_token_6n * rate, "mfu_exact": self.flops_per_token_exact * rate}

    def as_dict(self) -> dict[str, Any]:
        return {"format_version": 1, **asdict(self)}

    def describe(self) -> str:
        """The plan as the lines that a run prints at its start."""
        lines = [
            f"model      {self.parameters:,} parameters in {self.parameter_tensors} tensors",
            f"layout     {self.world_size} x {self.device}, {self.replicas} replicas",
            f"batch      {self.global_batch_size} samples x {self.sequence_length} tokens = {self.tokens_per_step:,} "
            f"tokens a step; {self.gradient_accumulation_steps} micro-batches of {self.micro_batch_size} a rank",
            f"length     {self.total_steps:,} steps, {self.total_tokens:,} tokens "
            f"({self.tokens_per_parameter:.1f} a parameter)",
            f"compute    {self.flops_per_token_6n:.3g} FLOPs a token (6N), {self.flops_per_token_exact:.3g} exactly",
            f"memory     {gib(self.rank_bytes)} a rank: weights {gib(self.weight_bytes)}, "
            f"gradients {gib(self.gradient_bytes)}, optimizer {gib(self.optimizer_bytes)}, "
            f"activations {gib(self.activation_bytes)}",
            f"checkpoint {gib(self.checkpoint_bytes)}",
        ]
        if self.predicted_seconds is not None and self.peak_flops is not None:
            lines.append(
                f"time       about {self.predicted_seconds / 3600:.1f} h at {ASSUMED_UTILISATION:.0%} of "
                f"{self.peak_flops / 1e12:.0f} TFLOP/s"
            )
        return "\n".join(lines)


def make_plan(config: RunConfig, world_size: int, device: str | None = None) -> Plan:
    """Work out the plan of a valid `config`. `device`: the accelerator's name; None: this machine's."""
    device = device or _device_name()
    training = config.training
    counted = count_parameters(config.model)
    total_tokens = config.total_steps * config.tokens_per_step
    shape = MeshShape.of_world(world_size)
    zero_stage = config.parallel.zero_stage
    compute_bytes = config.precision.compute_dtype.itemsize
    hardware = Hardware(device, compute_bytes)
    weight_bytes = config.precision.weight_dtype(zero_stage).itemsize
    # ZeRO-0 has no second copy of the weights for the optimizer.
    replicated = zero_stage == 0
    memory = training_state_bytes(config.model, zero_stage, world_size, weight_bytes)
    six_n = six_n_flops_per_token(config.model)
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
    return Plan(
        world_size=world_size,
        replicas=shape.data,
        micro_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.global_batch_size // (training.micro_batch_size * shape.data),
        global_batch_size=training.global_batch_size,
        sequence_length=training.sequence_length,
        tokens_per_step=config.tokens_per_step,
        total_steps=config.total_steps,
        total_tokens=total_tokens,
        parameters=counted.total,
        parameter_tensors=counted.tensors,
        tokens_per_parameter=total_tokens / counted.total,
        flops_per_token_6n=six_n,
        flops_per_token_exact=training_flops_per_token(config.model, training.sequence_length, hardware),
        weight_bytes=memory.weights,
        gradient_bytes=memory.gradients,
        optimizer_bytes=8.0 * counted.total if replicated else memory.optimizer,
        activation_bytes=activation_bytes(
            config.model,
            training.micro_batch_size,
            training.sequence_length,
            config.parallel.activation_checkpointing,
            hardware,
        ),
        # fp32 weights and two fp32 moments.
        checkpoint_bytes=12.0 * counted.total,
        device=device,
        peak_flops=peak,
        predicted_seconds=None if peak is None else six_n * total_tokens / (peak * ASSUMED_UTILISATION * world_size),
    )


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def gib(count: float) -> str:
    """A number of bytes for a reader."""
    return f"{count / 2**30:.2f} GiB"
