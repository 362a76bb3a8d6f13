"""Which part of which parameter a rank holds under each ZeRO stage.

DeepSpeed keeps the fp32 weights and the moments in flat tensors, cut differently by each stage. The attribute names of
DeepSpeed that this file relies on are those of the release pinned in pyproject.toml; nothing else in the project
touches them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from train.parallel.fragments import Fragment, ReadRange
from train.parallel.token_loss import model_name

Named = Sequence[tuple[str, nn.Parameter]]


def parameter_fragments(engine: DeepSpeedEngine, named: Named, is_first: bool) -> list[Fragment]:
    """Every fragment that this rank holds, in the order of the model's parameters.

    Args:
        named: the parameters that the optimizer has, under the model's own names.
        is_first: whether this rank owns what all ranks with the same parameters hold whole.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return list(_stage_3_fragments(engine, optimizer, named))
    if isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        return list(_flat_group_fragments(engine, optimizer, named))
    return list(_replicated_fragments(engine, named, is_first))


def _replicated_fragments(engine: DeepSpeedEngine, named: Named, owned: bool) -> Iterator[Fragment]:
    """ZeRO-0: every rank holds everything."""
    for name, parameter in named:

        def read_gradient(parameter: nn.Parameter = parameter) -> Tensor | None:
            return parameter.grad

        yield Fragment(
            name=name,
            shape=tuple(parameter.shape),
            offset=0,
            numel=parameter.numel(),
            owned=owned,
            compute=parameter.detach().view(-1),
            optimizer=engine.basic_optimizer,
            optimizer_parameter=parameter,
            start=0,
            read_gradient=read_gradient,
        )


def _flat_group_fragments(
    engine: DeepSpeedEngine, optimizer: DeepSpeedZeroOptimizer | BF16_Optimizer, named: Named
) -> Iterator[Fragment]:
    """ZeRO-1 and 2: each parameter group is one flat tensor, cut evenly over the ranks."""
    if isinstance(optimizer, BF16_Optimizer):
        flat_partitions = optimizer.fp32_groups_flat_partition
    else:
        flat_partitions = optimizer.single_partition_of_fp32_groups
    parameter: Any
    for name, parameter in named:
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        address = mapping.lp_fragment_address

        def read_gradient(parameter: Any = parameter, mapping: Any = mapping, address: Any = address) -> Tensor | None:
            gradient: Tensor | None = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
            if gradient is None:
                return None
            # BF16_Optimizer keeps the whole parameter's gradient on every rank.
            whole = gradient.numel() == parameter.numel()
            return gradient.reshape(-1).narrow(0, address.start, address.numel) if whole else gradient

        yield Fragment(
            name=name,
            shape=tuple(parameter.shape),
            offset=address.start,
            numel=address.numel,
            owned=True,
            compute=parameter.detach().view(-1).narrow(0, address.start, address.numel),
            optimizer=engine.basic_optimizer,
            optimizer_parameter=flat_partitions[mapping.param_group_index],
            start=mapping.hp_fragment_address.start,
            read_gradient=read_gradient,
        )


def _stage_3_fragments(
    engine: DeepSpeedEngine, optimizer: DeepSpeedZeroOptimizer_Stage3, named: Named
) -> Iterator[Fragment]:
    """ZeRO-3: every parameter is cut over the ranks by itself; the last ranks may hold padding only."""
    parameter: Any
    for name, parameter in named:
        group, start, partition_numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        offset = optimizer._get_param_partition_rank(parameter) * partition_numel
        numel = min(partition_numel, parameter.ds_numel - offset)
        if numel <= 0:
            continue

        def read_gradient(parameter: Any = parameter, numel: int = numel) -> Tensor:
            gradient: Tensor
            gradient, _ = optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=True)
            return gradient.narrow(0, 0, numel)

        yield Fragment(
            name=name,
            shape=tuple(parameter.ds_shape),
            offset=offset,
            numel=numel,
            owned=True,
            compute=parameter.ds_tensor.detach().view(-1).narrow(0, 0, numel),
            optimizer=engine.basic_optimizer,
            optimizer_parameter=optimizer.fp32_partitioned_groups_flat[group],
            start=start,
            read_gradient=read_gradient,
        )


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that this rank has whole between two steps; under ZeRO-3 those that are too small to be cut."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if getattr(parameter, "ds_status", ZeroParamStatus.AVAILABLE) is ZeroParamStatus.AVAILABLE
    }


def accumulated_gradient(engine: DeepSpeedEngine, parameter: Any) -> Tensor:
    """Where this rank's gradients of a parameter add up over micro-batches, before ranks reduce them. ZeRO 0 and 1."""
    gradient: Tensor = parameter._hp_grad if isinstance(engine.optimizer, BF16_Optimizer) else parameter.grad
    return gradient


def fill_weights(engine: DeepSpeedEngine, fragments: Sequence[Fragment], read: ReadRange) -> None:
    """Set every weight that this rank holds, compute copy and fp32 copy alike."""
    by_name = {fragment.name: fragment for fragment in fragments}
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        # Between two steps, small parameters are kept whole as well: those copies are let go, and gathered anew.
        engine.optimizer.checkpoint_event_prologue()
        for fragment in fragments:
            part = read(fragment.name, fragment.offset, fragment.numel)
            fragment.compute.copy_(part)
            fragment.master.copy_(part)
        engine.optimizer.checkpoint_event_epilogue()
        return
    for engine_name, parameter in engine.module.named_parameters():
        name = model_name(engine_name)
        whole = read(name, 0, parameter.numel())
        parameter.data.copy_(whole.view_as(parameter))
        held = by_name.get(name)
        if held is not None:
            part = whole.narrow(0, held.offset, held.numel)
            held.compute.copy_(part)
            held.master.copy_(part)
