"""One residual block: pre-norm, mixer, and for most kinds a second pre-norm and a feed-forward layer.

Axes: B batch, S sequence, D model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from model import compilation, statistics
from model.compilation import COMPILED
from model.config import ModelConfig
from model.layers import layer_kind
from model.layers.base import SlicedMixer
from model.layers.feed_forward import GatedGELU, SwiGLU, feed_forward
from model.norms import norm_class
from model.recomputation import recomputed
from model.sequence import LOCAL, SequenceContext
from model.state import BlockState


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); the NeurIPS mLSTM block has no feed-forward layer.

    The 7B block: arXiv 2503.13427 figure 3. The NeurIPS blocks: arXiv 2405.04517 figures 10 and 11.
    """

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        digits = max(2, len(str(config.n_blocks - 1)))
        self.statistics_name = name = f"blocks.{index:0{digits}d}"
        kind = layer_kind(config, config.block_kinds()[index])
        self.kind = kind.name
        self._loops_on_cpu = kind.loops_on_cpu
        norm = norm_class(config.family)
        self.mixer_norm = norm(config.d_model, config.norm_eps, f"{name}.mixer_norm")
        self.mixer = kind.module(config, f"{name}.mixer")
        self._has_pieces = isinstance(self.mixer, SlicedMixer)
        self.ffn: SwiGLU | GatedGELU | None = None
        if kind.has_feed_forward:
            self.ffn_norm = norm(config.d_model, config.norm_eps, f"{name}.ffn_norm")
            self.ffn = feed_forward(config)

    def forward(
        self,
        x: Tensor,
        document_start: Tensor | None = None,
        state: BlockState | None = None,
        return_state: bool = False,
        activation_checkpointing: str = "none",
        sequence: SequenceContext = LOCAL,
        execution: str = compilation.WRITTEN,
    ) -> tuple[Tensor, BlockState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the state behind x, if asked for.

        `activation_checkpointing`: one of model.recomputation.ACTIVATION_CHECKPOINTING. `execution`: how it runs in
        passes that train, of model.compilation.
        """
        if self._loops_on_cpu and x.device.type == "cpu":
            execution = compilation.WRITTEN
        # Chosen before anything is recomputed: its second run has to be like the first.
        both, mixer, ffn = (
            compilation.runnable(function, execution)
            for function in (Block._both_branches, Block._mixer_branch, Block._ffn_branch)
        )
        if sequence.size > 1 and both is not Block._both_branches and self._has_pieces:
            both = functools.partial(Block._in_pieces, behind=Block._behind_both)
            mixer = functools.partial(Block._in_pieces, behind=Block._behind_mixer)
        if activation_checkpointing == "block" and torch.is_grad_enabled():
            x, new_state = recomputed(sequence, both, self, x, document_start, state, return_state, sequence)
        elif activation_checkpointing == "unit" and torch.is_grad_enabled():
            x, new_state = recomputed(sequence, mixer, self, x, document_start, state, return_state, sequence)
            if self.ffn is not None:
                x = recomputed(sequence, ffn, self, x)
        else:
            x, new_state = both(self, x, document_start, state, return_state, sequence)
        if statistics.is_recording():
            statistics.record_rms(f"{self.statistics_name}.output_rms", x)
        return x, new_state

    def _both_branches(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: BlockState | None,
        return_state: bool,
        sequence: SequenceContext,
    ) -> tuple[Tensor, BlockState | None]:
        x, new_state = self._mixer_branch(x, document_start, state, return_state, sequence)
        return (x if self.ffn is None else self._ffn_branch(x)), new_state

    def _mixer_branch(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: BlockState | None,
        return_state: bool,
        sequence: SequenceContext,
    ) -> tuple[Tensor, BlockState | None]:
        y, new_state = self.mixer(self.mixer_norm(x), document_start, state, return_state, sequence)
        return x + y, new_state

    def _in_pieces(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: BlockState | None,
        return_state: bool,
        sequence: SequenceContext,
        behind: Callable[..., Tensor],
    ) -> tuple[Tensor, BlockState | None]:
        """A branch whose ranks exchange in its middle: compiled before that and `behind` it."""
        mixer = cast(SlicedMixer, self.mixer)
        normed, opened = compilation.compiled(Block._before_exchange, COMPILED)(self, x, document_start)
        entering = mixer.entering(opened, state, sequence)
        beside = mixer.beside(normed)
        inside, new_state = mixer.inside(opened, entering, state, return_state, sequence)
        return compilation.compiled(behind, COMPILED)(self, x, inside, beside), new_state

    def _before_exchange(self, x: Tensor, document_start: Tensor | None) -> tuple[Tensor, Any]:
        normed = self.mixer_norm(x)
        return normed, cast(SlicedMixer, self.mixer).opened(normed, document_start)

    def _behind_mixer(self, x: Tensor, inside: Tensor, beside: Tensor) -> Tensor:
        return x + cast(SlicedMixer, self.mixer).closed(inside, beside)

    def _behind_both(self, x: Tensor, inside: Tensor, beside: Tensor) -> Tensor:
        x = self._behind_mixer(x, inside, beside)
        return x if self.ffn is None else self._ffn_branch(x)

    def _ffn_branch(self, x: Tensor) -> Tensor:
        assert self.ffn is not None
        return x + self.ffn(self.ffn_norm(x))


class Blocks(nn.Module):
    """Consecutive blocks of a model under their numbers in it, which their parameters' names begin with."""

    def __init__(self, config: ModelConfig, numbers: range):
        super().__init__()
        self.numbers = numbers
        for number in numbers:
            self.add_module(str(number), Block(config, number))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Block:
        block = self.get_submodule(str(number))
        assert isinstance(block, Block)
        return block

    def __iter__(self) -> Iterator[Block]:
        return (self[number] for number in self.numbers)
