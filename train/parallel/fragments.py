"""One view on weights, gradients and optimizer moments for every ZeRO stage.

DeepSpeed keeps the fp32 weights and the moments in flat tensors, cut differently by each stage. A `Fragment` says which
part of which parameter a rank holds there. Checkpoints, initialisation, gradient norms and the finite check all work on
fragments, so none of them knows a stage, and a checkpoint written under one layout loads under any other.

The attribute names of DeepSpeed that this file relies on are those of the release pinned in pyproject.toml; nothing
else in the project touches them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Fragment:
    """The contiguous part [offset, offset + numel) of one flattened parameter, as held by this rank."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int
    # False where another rank holds the same values and is the one that counts and saves them.
    owned: bool
    # The parameter as the forward pass reads it: flat, this fragment's part, in the compute dtype.
    compute: torch.Tensor
    # The flat fp32 tensor that the optimizer updates, and where this fragment begins in it.
    optimizer_parameter: torch.Tensor
    start: int
    # The reduced (averaged) gradient of this fragment; valid after the last backward of a step, before the optimizer.
    read_gradient: Callable[[], torch.Tensor | None]

    @property
    def master(self) -> torch.Tensor:
        """View [numel] on the fp32 weights."""
        return self.optimizer_parameter.detach().view(-1).narrow(0, self.start, self.numel)

    def gradient(self) -> torch.Tensor | None:
        """Flat gradient [numel], or None when no gradient reached the parameter."""
        gradient = self.read_gradient()
        return None if gradient is None else gradient.detach().reshape(-1)

    def moment(self, optimizer: torch.optim.Optimizer, key: str) -> torch.Tensor:
        """View [numel] on an optimizer moment; `prepare_moments` must have run."""
        return optimizer.state[self.optimizer_parameter][key].view(-1).narrow(0, self.start, self.numel)


def parameter_name(name: str) -> str:
    """The model's own name of an engine parameter (the engine wraps the model in a loss module)."""
    return name.removeprefix("model.")


def parameter_fragments(engine: DeepSpeedEngine) -> list[Fragment]:
    """Every fragment that this rank holds, in the order of the model's parameters."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return list(_stage_3_fragments(engine, optimizer))
    if isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        return list(_flat_group_fragments(engine, optimizer))
    return list(_replicated_fragments(engine))


def _replicated_fragments(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    """ZeRO-0: every rank holds everything."""
    owned = engine.global_rank == 0
    for name, parameter in engine.module.named_parameters():
        yield Fragment(
            name=parameter_name(name),
            shape=tuple(parameter.shape),
            offset=0,
            numel=parameter.numel(),
            owned=owned,
            compute=parameter.detach().view(-1),
            optimizer_parameter=parameter,
            start=0,
            read_gradient=lambda parameter=parameter: parameter.grad,
        )


def _flat_group_fragments(engine: DeepSpeedEngine, optimizer: DeepSpeedZeroOptimizer | BF16_Optimizer):
    """ZeRO-1 and 2: each parameter group is one flat tensor, cut evenly over the ranks."""
    if isinstance(optimizer, BF16_Optimizer):
        flat_partitions = optimizer.fp32_groups_flat_partition
    else:
        flat_partitions = optimizer.single_partition_of_fp32_groups
    for name, parameter in engine.module.named_parameters():
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        address = mapping.lp_fragment_address

        def read_gradient(parameter=parameter, mapping=mapping, address=address):
            gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
            if gradient is None:
                return None
            # BF16_Optimizer keeps the whole parameter's gradient on every rank.
            whole = gradient.numel() == parameter.numel()
            return gradient.reshape(-1).narrow(0, address.start, address.numel) if whole else gradient

        yield Fragment(
            name=parameter_name(name),
            shape=tuple(parameter.shape),
            offset=address.start,
            numel=address.numel,
            owned=True,
            compute=parameter.detach().view(-1).narrow(0, address.start, address.numel),
            optimizer_parameter=flat_partitions[mapping.param_group_index],
            start=mapping.hp_fragment_address.start,
            read_gradient=read_gradient,
        )


def _stage_3_fragments(engine: DeepSpeedEngine, optimizer: DeepSpeedZeroOptimizer_Stage3) -> Iterator[Fragment]:
    """ZeRO-3: every parameter is cut over the ranks by itself; the last ranks may hold padding only."""
    for name, parameter in engine.module.named_parameters():
        group, start, partition_numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        offset = optimizer._get_param_partition_rank(parameter) * partition_numel
        numel = min(partition_numel, parameter.ds_numel - offset)
        if numel <= 0:
            continue

        def read_gradient(parameter=parameter, numel=numel):
            gradient, _ = optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=True)
            return gradient.narrow(0, 0, numel)

        yield Fragment(
            name=parameter_name(name),
            shape=tuple(parameter.ds_shape),
            offset=offset,
            numel=numel,
            owned=True,
            compute=parameter.ds_tensor.detach().view(-1).narrow(0, 0, numel),
            optimizer_parameter=optimizer.fp32_partitioned_groups_flat[group],
            start=start,
            read_gradient=read_gradient,
        )


def base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The torch optimizer that DeepSpeed wraps."""
    return engine.basic_optimizer


def prepare_moments(engine: DeepSpeedEngine, fragments: list[Fragment], completed_steps: int) -> None:
    """Create AdamW's state tensors (zero moments, `completed_steps` applied) where the first step would create them."""
    optimizer = base_optimizer(engine)
    for parameter in {id(f.optimizer_parameter): f.optimizer_parameter for f in fragments}.values():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(completed_steps), device=_step_device(optimizer, parameter)),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


def _step_device(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.device:
    """Where torch's AdamW keeps its step count: beside the parameter when fused, else on the host."""
    return parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")


def fill_weights(engine: DeepSpeedEngine, fragments: list[Fragment], read: Callable[[str], torch.Tensor]) -> None:
    """Set every weight, compute copy and fp32 copy alike, from `read(name)`: the full fp32 parameter on the host."""
    by_name = {fragment.name: fragment for fragment in fragments}
    partitioned = isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)
    for engine_name, parameter in engine.module.named_parameters():
        name = parameter_name(engine_name)
        fragment = by_name.get(name)
        if partitioned and fragment is None:
            continue
        full = read(name)
        if not partitioned:
            parameter.data.copy_(full.view_as(parameter))
        if fragment is not None:
            part = full.reshape(-1).narrow(0, fragment.offset, fragment.numel)
            fragment.compute.copy_(part)
            fragment.master.copy_(part)
