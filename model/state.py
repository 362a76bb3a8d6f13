"""What a model carries from one stretch of tokens to the next: prefill, decoding and stateful training share it.

Axes: B batch, T cached tokens, NKV key/value heads, DH head dimension, K convolution kernel size, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kernels.mlstm import MLSTMState
from kernels.mlstm.step import DecodingState
from kernels.slstm import SLSTMState

Tree = TypeVar("Tree")


@dataclass
class ConvCellState:
    """Of a layer with a convolution before its cell: the NeurIPS mLSTM and every sLSTM."""

    # [B, K - 1, C] in the activations' dtype: the last inputs of the convolution.
    conv_tail: Tensor
    cell: MLSTMState | DecodingState | SLSTMState


@dataclass
class AttentionState:
    """A key/value cache. Of its T tokens only the last `position` belong to the document that is still open."""

    # [B, T, NKV, DH] each, keys with their rotary position applied.
    keys: Tensor
    values: Tensor
    # [B] int64: the position of the next token within its document.
    position: Tensor


BlockState = MLSTMState | DecodingState | ConvCellState | AttentionState


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

    def for_decoding(self) -> ModelState:
        """A copy whose mLSTM memories single tokens without gradients update where they lie: continue it once only."""
        return ModelState([_for_decoding(block) for block in self.blocks])


def _for_decoding(block: BlockState) -> BlockState:
    if isinstance(block, MLSTMState):
        return DecodingState.of(block)
    if isinstance(block, ConvCellState) and isinstance(block.cell, MLSTMState):
        return ConvCellState(block.conv_tail, DecodingState.of(block.cell))
    return block


def map_tensors(tree: Tree, function: Callable[[Tensor], Tensor]) -> Tree:
    """`tree` (dataclasses, lists and None, with tensors at the leaves) with `function` applied to every tensor."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, list):
        return [map_tensors(item, function) for item in tree]
    changed = {f.name: map_tensors(getattr(tree, f.name), function) for f in dataclasses.fields(tree)}
    return dataclasses.replace(tree, **changed)
