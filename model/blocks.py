"""One residual block: pre-norm, mixer, and for most kinds a second pre-norm and a feed-forward layer.

Axes: B batch, S sequence, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.mlstm import keeping_chunk_states
from model import statistics
from model.layers.attention import Attention
from model.config import ModelConfig
from model.layers.feed_forward import GatedGELU, SwiGLU
from model.layers.mlstm import MLSTM, PreUpMLSTM
from model.norms import LayerNorm, RMSNorm
from model.layers.slstm import SLSTM
from model.state import BlockState

ACTIVATION_CHECKPOINTING = ("none", "unit", "block")


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); the NeurIPS mLSTM block has no feed-forward layer.

    The 7B block: arXiv 2503.13427 figure 3. The NeurIPS blocks: arXiv 2405.04517 figures 10 and 11.
    """

    def __init__(self, config: ModelConfig, index: int, kind: str):
        super().__init__()
        digits = max(2, len(str(config.n_blocks - 1)))
        self.statistics_name = name = f"blocks.{index:0{digits}d}"
        self.kind = kind
        norm = norm_class(config)
        self.mixer_norm = norm(config.d_model, config.norm_eps, f"{name}.mixer_norm")
        if kind == "attention":
            self.mixer = Attention(config)
        elif kind == "slstm":
            self.mixer = SLSTM(config, f"{name}.mixer")
        elif config.family == "xlstm_7b":
            self.mixer = MLSTM(config, f"{name}.mixer")
        else:
            self.mixer = PreUpMLSTM(config, f"{name}.mixer")
        self.ffn = None
        if not isinstance(self.mixer, PreUpMLSTM):
            feed_forward = SwiGLU if config.family == "xlstm_7b" else GatedGELU
            self.ffn_norm = norm(config.d_model, config.norm_eps, f"{name}.ffn_norm")
            self.ffn = feed_forward(config.d_model, config.ffn_dim)

    def forward(
        self,
        x: Tensor,
        document_start: Tensor | None = None,
        state: BlockState | None = None,
        return_state: bool = False,
        activation_checkpointing: str = "none",
    ) -> tuple[Tensor, BlockState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the state behind x, if asked for.

        `activation_checkpointing`: "none" keeps every activation, "unit" keeps the inputs of the two residual branches
        and "block" the block's input only; the rest is computed again in the backward pass.
        """
        if activation_checkpointing == "block" and torch.is_grad_enabled():
            return _recomputed(self.forward, x, document_start, state, return_state)
        if activation_checkpointing == "unit" and torch.is_grad_enabled():
            x, new_state = _recomputed(self._mixer_branch, x, document_start, state, return_state)
            if self.ffn is not None:
                x = _recomputed(self._ffn_branch, x)
        else:
            x, new_state = self._mixer_branch(x, document_start, state, return_state)
            if self.ffn is not None:
                x = self._ffn_branch(x)
        statistics.record_rms(f"{self.statistics_name}.output_rms", x)
        return x, new_state

    def _mixer_branch(self, x, document_start, state, return_state):
        y, new_state = self.mixer(self.mixer_norm(x), document_start, state, return_state)
        return x + y, new_state

    def _ffn_branch(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.ffn_norm(x))


def norm_class(config: ModelConfig) -> type[RMSNorm] | type[LayerNorm]:
    """The norm of the residual branches and before the head."""
    return RMSNorm if config.family == "xlstm_7b" else LayerNorm


def _recomputed(function, *arguments):
    """Call `function`, keeping its arguments alone for the backward pass."""
    # No layer draws random numbers, so there is no random state to restore.
    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (keeping_chunk_states(), _second_run()),
    )


@contextlib.contextmanager
def _second_run() -> Iterator[None]:
    with keeping_chunk_states(), statistics.paused():
        yield
