"""What a model carries from one stretch of tokens to the next: prefill, decoding and stateful training share it.

Axes: B batch, K convolution kernel size, C channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor

Tree = TypeVar("Tree")


class BlockState(Protocol):
    """The state of one block: any dataclass whose leaves are tensors with the batch as their first axis."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


@dataclass
class ConvCellState:
    """Of a layer with a convolution before its cell: the NeurIPS mLSTM and every sLSTM."""

    # [B, K - 1, C] in the activations' dtype: the last inputs of the convolution.
    conv_tail: Tensor
    # Of the mLSTM or the sLSTM (kernels.mlstm, kernels.slstm).
    cell: Any


@dataclass
class ModelState:
    """The state of every block, first to last.

    Nothing changes it in place, so one state may be continued many times, unless it came from `for_decoding`.
    """

    blocks: list[BlockState]

    def map(self, function: Callable[[Tensor], Tensor]) -> ModelState:
        """A state of the same form with `function` applied to every tensor (each has the batch as its first axis)."""
        return map_tensors(self, function)

    def detach(self) -> ModelState:
        """The same values, cut from the gradient graph."""
        return self.map(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> ModelState:
        """The same state on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    def for_decoding(self, room: int | None = None) -> ModelState:
        """A copy whose mLSTM memories single tokens without gradients update where they lie: continue it once only.

        `room`: tokens that the caches of attention then have memory for, so that they too are updated where they lie;
        None: they grow with every token.
        """
        return ModelState([for_decoding(block, room) for block in self.blocks])


@functools.singledispatch
def for_decoding(state: Any, room: int | None = None) -> Any:
    """The state of one block as `ModelState.for_decoding` has it; a kind of layer registers its own way."""
    return state


@for_decoding.register
def _(state: ConvCellState, room: int | None = None) -> ConvCellState:
    return ConvCellState(state.conv_tail, for_decoding(state.cell, room))


def map_tensors(tree: Tree, function: Callable[[Tensor], Tensor]) -> Tree:
    """`tree` (dataclasses, lists and None, with tensors at the leaves) with `function` applied to every tensor."""
    return cast(Tree, _mapped(tree, function))


def named_tensors(tree: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    """The tensors of `tree` under their places in it, as "blocks.0.cell.C", in the order of `map_tensors`."""
    if tree is None:
        return []
    if isinstance(tree, Tensor):
        return [(prefix, tree)]
    if isinstance(tree, list):
        parts = [(str(index), item) for index, item in enumerate(tree)]
    else:
        parts = [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    before = f"{prefix}." if prefix else ""
    return [found for name, part in parts for found in named_tensors(part, before + name)]


def _mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, list):
        return [_mapped(item, function) for item in tree]
    changed = {f.name: _mapped(getattr(tree, f.name), function) for f in dataclasses.fields(tree)}
    return dataclasses.replace(tree, **changed)
