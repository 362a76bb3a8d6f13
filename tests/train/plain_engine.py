"""The engine protocol in plain PyTorch: one process, fp32, nothing sharded. Shows that nothing asks for more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data_pipeline.reading.batch import Batch
from model.language_model import LanguageModel
from train.config import RunConfig
from train.optimizer import build_optimizer
from train.parallel.fragments import Fragment, ReadRange, clip_gradients, prepare_moments, squared_gradient_norm
from train.parallel.mesh import Mesh
from train.parallel.token_loss import TokenLossSum, on_device
from train.plan import Plan


class PlainEngine:
    """`train.parallel.engine.Engine` on one device."""

    carried = None

    def __init__(self, config: RunConfig, plan: Plan, mesh: Mesh):
        assert mesh.size == 1 and config.precision.compute_dtype is torch.float32
        self.mesh = mesh
        self.model = LanguageModel(config.model)
        self._clipping = config.optimizer.gradient_clipping
        self._module = TokenLossSum(self.model, config.training.z_loss_weight)
        self._optimizer = build_optimizer(self.model.named_parameters(), config.optimizer)
        self.fragments = [
            Fragment(
                name=name,
                shape=tuple(parameter.shape),
                offset=0,
                numel=parameter.numel(),
                owned=True,
                compute=parameter.detach().view(-1),
                optimizer=self._optimizer,
                optimizer_parameter=parameter,
                start=0,
                read_gradient=lambda parameter=parameter: parameter.grad,
            )
            for name, parameter in self.model.named_parameters()
        ]

    def whole_weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def train_batch(self, micro_batches: Sequence[Batch], valid_tokens: Tensor) -> Tensor:
        loss = torch.zeros(())
        for batch in micro_batches:
            loss_sum, _ = self._module(*on_device(batch, self.mesh.device))
            part = loss_sum / valid_tokens
            part.backward()
            loss += part.detach()
        return loss

    def evaluate_batch(self, batch: Batch) -> tuple[float, int]:
        self._module.eval()
        with torch.no_grad():
            loss, _ = self._module(*on_device(batch, self.mesh.device))
        self._module.train()
        return float(loss), batch.scored_targets()

    def gradient_norm(self) -> Tensor:
        return squared_gradient_norm(self.fragments, self.mesh.device).sqrt()

    def step(self, learning_rate: float, gradient_norm: float) -> bool:
        applied = clip_gradients(self.fragments, gradient_norm, self._clipping)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if applied:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return applied

    def fill(self, read: ReadRange, completed_steps: int) -> None:
        for fragment in self.fragments:
            fragment.master.copy_(read(fragment.name, fragment.offset, fragment.numel))
        prepare_moments(self.fragments, completed_steps)

    def describe(self) -> dict[str, Any]:
        return {"engine": "plain"}

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
