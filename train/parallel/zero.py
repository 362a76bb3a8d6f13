"""The engine of ZeRO 0 to 3: every rank computes the whole model; optimizer, gradients and weights may be sharded."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any, TextIO, cast

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    # DeepSpeed looks for its accelerator when it is first imported, and warns where it has to guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.runtime import compiler
from deepspeed.utils import groups as deepspeed_groups

from data_pipeline.reading.batch import Batch
from model.blocks import Block
from model.compilation import CAPTURED, WRITTEN
from model.language_model import LanguageModel
from model.stages import Stage
from model.state import ModelState
from train.config import RunConfig
from train.optimizer import build_optimizer
from train.parallel.carried_state import CarriedState
from train.parallel.flat_order import aligned_first
from train.parallel.fragments import Fragment, ReadRange, clip_gradients, prepare_moments, squared_gradient_norm
from train.parallel.mesh import Mesh
from train.parallel.sequence import DistributedSequence
from train.parallel.time_chunks import TimeChunks
from train.parallel.token_loss import TokenLossSum, model_name, on_device
from train.parallel.zero_fragments import fill_weights, parameter_fragments, whole_weights
from train.plan import Plan
from train.watch.whereabouts import BACKWARD, FORWARD


def _import_muon() -> None:
    """Before DeepSpeed does, to tell our optimizer from its Muon, which hands functions to torch.compile as it is
    imported. No run calls them: uncompiled, every start is 1.5 s shorter, which TorchInductor's import takes.
    """
    compile_function = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_function


_import_muon()


def deepspeed_config(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived. Clipping, the finite check, the schedule and checkpoints are ours."""
    stage = config.parallel.zero_stage
    is_bf16 = config.precision.is_bf16
    # Each time chunk of a micro-batch has a backward pass, and DeepSpeed takes it for a micro-batch.
    chunks = TimeChunks(config.training.time_chunk).count(plan.sequence_length)
    zero: dict[str, Any] = {"stage": stage}
    derived = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps * chunks,
        # It counts every process as a replica, also those that hold slices of the same samples.
        "train_batch_size": plan.global_batch_size * plan.sequence_ranks * chunks,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    if stage in (1, 2) and not (stage == 1 and is_bf16):
        zero["compute_grad_norm"] = False
    if is_bf16 and not config.precision.uses_autocast(stage):
        derived["bf16"] = {"enabled": True, "check_grad_overflow": False}
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    return derived


class ZeroEngine:
    """`train.parallel.engine.Engine` by DeepSpeed's engine."""

    def __init__(self, config: RunConfig, plan: Plan, mesh: Mesh):
        self.mesh = mesh
        self._zero_stage = config.parallel.zero_stage
        self._precision = config.precision
        self._clipping = config.optimizer.gradient_clipping
        self._settings = deepspeed_config(config, plan)
        self._time_chunks = TimeChunks(config.training.time_chunk)
        self._backward_passes_left = 0
        self.carried: CarriedState | None = None
        if config.training.carry_state:
            share = plan.global_batch_size // plan.replicas
            lanes = range(mesh.data * share, (mesh.data + 1) * share)
            self.carried = CarriedState(lanes, plan.micro_batch_size, self._some_state)
        _join_process_group(mesh)
        with self._construction_context():
            self.model: Stage = self._make_model(config)
        self.model.activation_checkpointing = config.parallel.activation_checkpointing
        self.model.execution = config.execution(mesh.device.type)
        if mesh.shape.sequence > 1:
            compiles = self.model.execution != WRITTEN
            self.model.sequence = DistributedSequence(mesh, config.parallel.sequence_exchange, compiles)
        with _prints_logged():
            module = self._make_module(config)
            if self._zero_stage == 3:
                # The weights of a block are gathered at once: in every layer by itself, the host waits for each.
                deepspeed.utils.set_z3_leaf_modules(module, [Block])
        named = self._trained_parameters(module)
        self._optimizer = build_optimizer(aligned_first(named), config.optimizer)
        with _prints_logged():
            self._deepspeed, *_ = deepspeed.initialize(
                model=module,
                optimizer=self._optimizer,
                config=self._settings,
                dist_init_required=False,
            )
        self.fragments: list[Fragment] = parameter_fragments(
            self._deepspeed, named, is_first=mesh.place_in("data_and_sequence") == 0
        )

    def _make_model(self, config: RunConfig) -> Stage:
        return LanguageModel(config.model)

    def _make_module(self, config: RunConfig) -> nn.Module:
        """What DeepSpeed runs, around `model`."""
        return TokenLossSum(self.model, config.training.z_loss_weight)

    def _trained_parameters(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Those that the optimizer gets, under the model's own names."""
        return [(model_name(name), parameter) for name, parameter in module.named_parameters()]

    def _construction_context(self) -> contextlib.AbstractContextManager[Any]:
        if self._zero_stage < 3:
            return torch.device(self.mesh.device)
        # Its `dtype` argument chooses bf16 on a host without fp16 whatever is passed; the dictionary is read properly.
        context: contextlib.AbstractContextManager[Any] = deepspeed.zero.Init(config_dict_or_path=self._settings)
        return context

    def whole_weights(self) -> dict[str, Tensor]:
        """See `Engine.whole_weights`."""
        return whole_weights(self.model)

    def train_batch(self, micro_batches: Sequence[Batch], valid_tokens: Tensor) -> Tensor:
        """See `Engine.train_batch`. DeepSpeed averages over ranks, so each one's part is weighted by their number."""
        loss = torch.zeros((), device=self.mesh.device)
        scale = self.mesh.size_of("data_and_sequence") / valid_tokens
        self._backward_passes_left = sum(self._time_chunks.count(batch.tokens.shape[1]) for batch in micro_batches)
        carried = self.carried
        for number, batch in enumerate(micro_batches):
            self.mesh.whereabouts.enter(FORWARD)
            of_batch = on_device(batch, self.mesh.device)
            state = None if carried is None else carried.entering(number, batch.continues)
            loss_sum, behind = self._time_chunks.forward_backward(
                self._compute, of_batch, self._backward, scale, state, return_state=carried is not None
            )
            loss += loss_sum / valid_tokens
            if carried is not None and behind is not None:
                carried.leave(number, behind)
        return loss

    def _some_state(self, rows: int) -> ModelState:
        """A state of so many rows, for its form. Collective."""
        tokens = torch.zeros(rows, 1, dtype=torch.int64, device=self.mesh.device)
        with torch.no_grad():
            _, state = self._compute(tokens, None, torch.ones_like(tokens, dtype=torch.bool), None, True)
        assert isinstance(state, ModelState)
        return state

    def _compute(self, *arguments: Any) -> tuple[Any, Any]:
        """What `TokenLossSum` computes."""
        with self._compute_context():
            result: tuple[Any, Any] = self._deepspeed(*arguments)
            return result

    def _backward(self, loss: Tensor) -> None:
        """One backward pass of the step: to DeepSpeed each time chunk is a micro-batch. ZeRO 0 and 1 reduce gradients
        after the last one of the step, ZeRO 2 and 3 after each."""
        self.mesh.whereabouts.enter(BACKWARD)
        if self.model.execution == CAPTURED:
            # DeepSpeed keeps gradients until the next backward pass, and those of a CUDA graph do not last as long.
            for parameter in self.model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        self._backward_passes_left -= 1
        if self._backward_passes_left:
            # Lets DeepSpeed count the micro-batch.
            self._deepspeed.step()

    def evaluate_batch(self, batch: Batch) -> tuple[float, int]:
        """See `Engine.evaluate_batch`."""
        self._deepspeed.eval()
        try:
            with torch.no_grad():
                of_batch = on_device(batch, self.mesh.device)
                return float(self._time_chunks.loss_sum(self._compute, of_batch)), batch.scored_targets()
        finally:
            self._deepspeed.train()

    def _compute_context(self) -> contextlib.AbstractContextManager[Any]:
        """ZeRO-0 in bf16 keeps fp32 weights and casts in autocast: DeepSpeed's own bf16 mode applies a spurious first
        optimizer step there (facts in docs/training.md)."""
        if not self._precision.uses_autocast(self._zero_stage):
            return contextlib.nullcontext()
        return torch.autocast(self.mesh.device.type, self._precision.compute_dtype)

    def gradient_norm(self) -> Tensor:
        """See `Engine.gradient_norm`."""
        squares = squared_gradient_norm(self.fragments, self.mesh.device)
        return self.mesh.sum(squares, group="world").sqrt()

    def step(self, learning_rate: float, gradient_norm: float) -> bool:
        """See `Engine.step`."""
        applied = clip_gradients(self.fragments, gradient_norm, self._clipping)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.skip_step = not applied
        if not applied and self.carried is not None:
            self.carried.drop_non_finite()
        self._take_step()
        return applied

    def _take_step(self) -> None:
        self._deepspeed.step()

    def fill(self, read: ReadRange, completed_steps: int) -> None:
        """See `Engine.fill`. Below ZeRO-3 the compute copies are whole, so whole parameters are read."""
        fill_weights(self._deepspeed, self.fragments, read)
        prepare_moments(self.fragments, completed_steps)

    def describe(self) -> dict[str, Any]:
        """DeepSpeed's dictionary."""
        return self._settings

    def close(self) -> None:
        """See `Engine.close`."""
        self._deepspeed.destroy()
        # DeepSpeed's globals hold its groups: the next engine of this process would use those of a world that is gone.
        deepspeed_groups._release_process_group_references()


class _PrintedLines(io.TextIOBase):
    """A text stream whose lines become records of DeepSpeed's log."""

    def __init__(self) -> None:
        self._logger = logging.getLogger("DeepSpeed").getChild("printed")
        # The logger above has its own level for what it is told itself; what reaches its handlers is theirs to choose.
        self._logger.setLevel(logging.INFO)

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                self._logger.info("%s", line.rstrip())
        return len(text)


def _prints_logged() -> contextlib.AbstractContextManager[Any]:
    """DeepSpeed's optimizer for bf16 prints the memory in use, 18 lines of it, whatever the level of its log is. The
    run's log file gets them, beside what DeepSpeed warns of; the terminal gets its errors."""
    return contextlib.redirect_stdout(cast("TextIO", _PrintedLines()))


def _join_process_group(mesh: Mesh) -> None:
    """DeepSpeed works on the process group that the mesh has made; of what it logs, the terminal keeps errors only."""
    for handler in logging.getLogger("DeepSpeed").handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
    # It calls collectives by names that torch 2.13 has deprecated, some at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if mesh.device.type == "cpu":
        # None of DeepSpeed's own operators: its shared-memory collective would be compiled with g++ at start-up, where
        # gloo does without it. When first asked which ones can be, it tries the compiler on each.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if mesh.device.type == "cuda" else "gloo", verbose=False)
