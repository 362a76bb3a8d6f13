"""The language model: embedding, residual blocks, norm, head.

Axes: B batch, S sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_sum
from kernels.precision import compute_dtype, has_autocast
from kernels.soft_cap import soft_cap
from model import statistics
from model.blocks import ACTIVATION_CHECKPOINTING, Block, norm_class
from model.config import ModelConfig
from model.state import ModelState

_MEASURED_TOKENS = 64
# By the loss_reduction of a forward pass, as in torch.nn.functional.cross_entropy.
_LOSSES = {"none": linear_cross_entropy, "sum": linear_cross_entropy_sum}


@dataclass
class ModelOutput:
    """What a forward pass returns; a field that was not asked for is None."""

    # [B, S, V] float32 (float64 for a float64 model), after the soft cap.
    logits: Tensor | None = None
    # [B, S] of the same dtype, nats; 0 where the target is -100.
    token_losses: Tensor | None = None
    # Their sum, 0-d, from a pass that makes its gradients at once (kernels.cross_entropy.linear_cross_entropy_sum).
    loss_sum: Tensor | None = None
    state: ModelState | None = None


class Embedding(nn.Embedding):
    """Token embedding [V, D] that leaves its memory as it is until model/initialisation.py fills it."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is: a 7B model would otherwise draw these weights twice."""


class LMHead(nn.Module):
    """Logits or losses from hidden states, with its own weight [V, D], so that a sharded engine gathers it here."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.soft_cap = config.logit_soft_cap

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, loss_reduction: str = "none", z_loss_weight: float = 0.0
    ) -> Tensor:
        """hidden [B, S, D] -> logits [B, S, V], or with targets [B, S] losses [B, S] or their sum; float32 at least."""
        if statistics.is_recording():
            self._record(hidden)
        if targets is not None:
            device = hidden.device.type
            if has_autocast(device) and torch.is_autocast_enabled(device):
                # As for every other product; the kernel itself computes in the dtype that it is given.
                hidden = hidden.to(torch.get_autocast_dtype(device))
            loss = _LOSSES[loss_reduction]
            return loss(hidden, self.weight, targets, soft_cap=self.soft_cap, z_loss_weight=z_loss_weight)
        return soft_cap(self._uncapped(hidden), self.soft_cap)

    def _uncapped(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight).to(compute_dtype(hidden))

    @torch.no_grad()
    def _record(self, hidden: Tensor) -> None:
        uncapped = self._uncapped(hidden[0, :_MEASURED_TOKENS])
        statistics.record("logits.max", "max", soft_cap(uncapped, self.soft_cap).max)
        statistics.record_saturation("logits.soft_cap_saturation", uncapped, self.soft_cap)


class LanguageModel(nn.Module):
    """A stack of `config.n_blocks` residual blocks between an embedding and a head.

    The parameters hold no meaningful values until `model.initialisation.initialise` or a load fills them; under
    torch.device("meta") nothing is allocated. `config` must have passed `model.config.validate_model`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = "none"
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, index, kind) for index, kind in enumerate(config.block_kinds()))
        self.out_norm = norm_class(config)(config.d_model, config.norm_eps, "out_norm")
        self.lm_head = LMHead(config)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    @property
    def activation_checkpointing(self) -> str:
        """What the backward pass recomputes: "none", the two residual branches of a "unit", or the whole "block"."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, mode: str) -> None:
        if mode not in ACTIVATION_CHECKPOINTING:
            raise ValueError(
                f"activation_checkpointing: unknown mode {mode!r}; choose one of {', '.join(ACTIVATION_CHECKPOINTING)}"
            )
        self._activation_checkpointing = mode

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        document_start: Tensor | None = None,
        state: ModelState | None = None,
        return_state: bool = False,
        loss_reduction: str = "none",
        z_loss_weight: float = 0.0,
    ) -> ModelOutput:
        """Run the model over a stretch of tokens: a training batch, a prompt, or one decoding step.

        Args:
            tokens: [B, S] int64 in [0, V).
            targets: [B, S] int64; -100 is not scored. With targets the losses are returned, without them the logits.
            document_start: [B, S] bool, True at the first token of each document: every layer starts empty there.
            state: what an earlier call returned for the tokens before these; None: empty.
            return_state: also return the state behind the last token.
            loss_reduction: "none" returns the losses of the tokens, "sum" their sum alone, which trains faster.
            z_loss_weight: adds z_loss_weight * logsumexp(logits)^2 to the loss of every scored token.

        Raises:
            ValueError: tokens, targets, document_start or state do not fit each other or the model, or an unknown
                reduction.
        """
        self._check_inputs(tokens, targets, document_start, state)
        if loss_reduction not in _LOSSES:
            raise ValueError(f"loss_reduction must be one of {', '.join(_LOSSES)}, not {loss_reduction!r}")
        x = self.embedding(tokens)
        block_states = []
        for index, block in enumerate(self.blocks):
            block_state = None if state is None else state.blocks[index]
            x, new_state = block(x, document_start, block_state, return_state, self.activation_checkpointing)
            block_states.append(new_state)
        result = self.lm_head(self.out_norm(x), targets, loss_reduction, z_loss_weight)
        kind = "logits" if targets is None else {"none": "token_losses", "sum": "loss_sum"}[loss_reduction]
        return ModelOutput(**{kind: result}, state=ModelState(block_states) if return_state else None)

    def _check_inputs(self, tokens, targets, document_start, state) -> None:
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise ValueError(f"tokens must be a non-empty [B, S] int64 tensor, got {_describe(tokens)}")
        if targets is not None and (targets.shape != tokens.shape or targets.dtype != torch.int64):
            raise ValueError(f"targets must be int64 of shape {tuple(tokens.shape)}, got {_describe(targets)}")
        if document_start is not None and (document_start.shape != tokens.shape or document_start.dtype != torch.bool):
            raise ValueError(
                f"document_start must be bool of shape {tuple(tokens.shape)}, got {_describe(document_start)}"
            )
        if state is not None and len(state.blocks) != len(self.blocks):
            raise ValueError(f"state is of a model with {len(state.blocks)} blocks, this model has {len(self.blocks)}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
