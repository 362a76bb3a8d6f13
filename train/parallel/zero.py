"""From a configuration to a DeepSpeed engine with a loss that counts every valid token once."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.initialisation import initialise_parameter
from model.language_model import LanguageModel
from train.config import RunConfig
from train.optimizer import build_optimizer
from train.parallel.fragments import Fragment, fill_weights, parameter_fragments, prepare_moments
from train.plan import Plan


class TokenLossSum(nn.Module):
    """The model as DeepSpeed sees it: tokens in, summed token losses out."""

    def __init__(self, model: LanguageModel, z_loss_weight: float):
        super().__init__()
        self.model = model
        self.z_loss_weight = z_loss_weight

    def forward(self, tokens: Tensor, targets: Tensor, document_start: Tensor) -> Tensor:
        """[B, S] int64, int64 (-100: not scored), bool -> fp32 scalar, the sum over the valid targets.

        The z-loss is part of it in training mode only: what is evaluated is the cross-entropy.
        """
        return self.model(
            tokens,
            targets=targets,
            document_start=document_start,
            loss_reduction="sum",
            z_loss_weight=self.z_loss_weight if self.training else 0.0,
        ).loss_sum


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(config: RunConfig) -> World:
    """Join the run's process group: NCCL with one GPU a process, gloo without a GPU.

    Reads the variables that torchrun sets; without them the run is one process.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    on_gpu = torch.cuda.is_available()
    # DeepSpeed calls collectives by names that torch 2.13 has deprecated, some at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not on_gpu:
        # The shared-memory collective would be compiled with g++ at start-up; gloo does without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if config.training.cpu_threads is not None:
            torch.set_num_threads(config.training.cpu_threads)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=config.parallel.collective_timeout_seconds),
        verbose=False,
    )
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def seed_everything(seed: int, rank: int) -> None:
    """Seed every generator of this process. Nothing in the training step draws from them today; dropout would."""
    for seed_generator in (random.seed, np.random.seed, torch.manual_seed):
        seed_generator((seed * 1_000_003 + rank) % 2**32)


def deepspeed_config(config: RunConfig, plan: Plan) -> dict:
    """DeepSpeed's dictionary, derived. Clipping, the finite check, the schedule and checkpoints are ours."""
    stage = config.parallel.zero_stage
    zero: dict = {"stage": stage}
    derived = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "train_batch_size": plan.global_batch_size,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    if stage in (1, 2) and not (stage == 1 and config.precision.compute == "bf16"):
        zero["compute_grad_norm"] = False
    if config.precision.compute == "bf16" and stage > 0:
        derived["bf16"] = {"enabled": True, "check_grad_overflow": False}
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    return derived


class Engine:
    """One rank's share of the model, its optimizer and its gradients."""

    def __init__(self, config: RunConfig, plan: Plan, world: World):
        self.config = config
        self.plan = plan
        self.world = world
        self.deepspeed_config = deepspeed_config(config, plan)
        with self._construction_context():
            self.model = LanguageModel(config.model)
        self.model.activation_checkpointing = config.parallel.activation_checkpointing
        module = TokenLossSum(self.model, config.training.z_loss_weight)
        named = [(name.removeprefix("model."), parameter) for name, parameter in module.named_parameters()]
        self.optimizer = build_optimizer(named, config.optimizer)
        self.deepspeed, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            config=self.deepspeed_config,
            dist_init_required=False,
        )
        self.fragments: list[Fragment] = parameter_fragments(self.deepspeed)
        # Shape of every parameter by name, also of those that ZeRO-3 keeps on other ranks.
        self.shapes = {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self.model.named_parameters()
        }

    def _construction_context(self) -> contextlib.AbstractContextManager:
        if self.config.parallel.zero_stage < 3:
            return torch.device(self.world.device)
        # Its `dtype` argument chooses bf16 on a host without fp16 whatever is passed; the dictionary is read properly.
        return deepspeed.zero.Init(config_dict_or_path=self.deepspeed_config)

    def initialise(self) -> None:
        """Fill all weights from the run's seed, the same under every layout."""
        self.fill(lambda name: initialise_parameter(self.config.model, name, self.shapes[name], self.config.seed), 0)

    def fill(self, read: Callable[[str], Tensor], completed_steps: int) -> None:
        """Set the weights from `read(name)` (full fp32 tensors on the host) and the moments to zero."""
        fill_weights(self.deepspeed, self.fragments, read)
        prepare_moments(self.deepspeed, self.fragments, completed_steps)

    def forward_backward(self, tokens: Tensor, targets: Tensor, document_start: Tensor, loss_scale: float) -> Tensor:
        """One micro-batch. Adds the gradient of (sum of token losses) * loss_scale; returns the sum, detached."""
        with self.compute_context():
            loss_sum = self.deepspeed(tokens, targets, document_start)
        self.deepspeed.backward(loss_sum * loss_scale, scale_wrt_gas=False)
        return loss_sum.detach()

    def compute_context(self) -> contextlib.AbstractContextManager:
        """ZeRO-0 in bf16 keeps fp32 weights and casts in autocast: DeepSpeed's own bf16 mode applies a spurious first
        optimizer step there (facts in docs/training.md)."""
        autocast = self.config.precision.compute == "bf16" and self.config.parallel.zero_stage == 0
        return torch.autocast(self.world.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()

    def end_micro_batch(self) -> None:
        """After every micro-batch but the last: lets DeepSpeed count it."""
        self.deepspeed.step()

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the averaged gradients, fp32 scalar on device, equal on all ranks; NaN or inf if any is."""
        squares = torch.zeros((), dtype=torch.float32, device=self.world.device)
        gradients = [g for f in self.fragments if f.owned and (g := f.gradient()) is not None]
        if gradients:
            squares = torch.stack(torch._foreach_norm([g.float() for g in gradients])).square().sum()
        dist.all_reduce(squares)
        return squares.sqrt()

    def step(self, learning_rate: float, gradient_norm: float) -> bool:
        """Clip, then apply one optimizer step at `learning_rate`; returns False when the step was skipped because the
        gradient is not finite. DeepSpeed's accumulation is emptied either way."""
        finite = np.isfinite(gradient_norm)
        limit = self.config.optimizer.gradient_clipping
        if finite and limit is not None and gradient_norm > limit:
            gradients = [g for f in self.fragments if (g := f.gradient()) is not None]
            torch._foreach_mul_(gradients, limit / (gradient_norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.skip_step = not finite
        self.deepspeed.step()
        return bool(finite)

    def close(self) -> None:
        self.deepspeed.destroy()
