"""A stage: the embedding, some residual blocks, norm and head, or a part of them. The whole model is one stage.

Axes: B batch, S sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cross_entropy import MASKED, linear_cross_entropy, linear_cross_entropy_sum
from kernels.precision import compute_dtype, has_autocast
from kernels.soft_cap import soft_cap
from model import compilation, statistics
from model.blocks import Blocks
from model.config import ModelConfig
from model.norms import norm_class
from model.parts import Part
from model.recomputation import ACTIVATION_CHECKPOINTING, unknown_mode
from model.sequence import LOCAL, SequenceContext
from model.state import ModelState

_MEASURED_TOKENS = 64
# By the loss_reduction of a forward pass, as in torch.nn.functional.cross_entropy.
_LOSSES = {"none": linear_cross_entropy, "sum": linear_cross_entropy_sum}


@dataclass
class ModelOutput:
    """What a forward pass returns; a field that was not asked for is None."""

    # [B, S, D], what the next stage takes; of a stage without the head.
    hidden: Tensor | None = None
    # [B, S, V] float32 (float64 for a float64 model), after the soft cap.
    logits: Tensor | None = None
    # [B, S] of the same dtype, nats; 0 where the target is -100.
    token_losses: Tensor | None = None
    # Their sum, 0-d, from a pass that makes its gradients at once (kernels.cross_entropy.linear_cross_entropy_sum).
    loss_sum: Tensor | None = None
    # [B, S], the targets that the losses are for.
    targets: Tensor | None = None
    state: ModelState | None = None

    @property
    def loss(self) -> Tensor:
        """The mean loss of the scored tokens, 0-d, nats (with a z-loss if the pass had one); needs targets."""
        total = self.loss_sum if self.token_losses is None else self.token_losses.sum()
        if total is None or self.targets is None:
            raise ValueError("there is no loss without targets: give them to the model")
        return total / (self.targets != MASKED).sum()


class Embedding(nn.Embedding):
    """Token embedding [V, D] that leaves its memory as it is until model/initialisation.py fills it."""

    weight: nn.Parameter

    def reset_parameters(self) -> None:
        """Leave the memory as it is: a 7B model would otherwise draw these weights twice."""


class LMHead(nn.Module):
    """Logits or losses from hidden states, with its own weight [V, D], so that a sharded engine gathers it here."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.soft_cap = config.logit_soft_cap

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        loss_reduction: str = "none",
        z_loss_weight: float = 0.0,
        measures: bool = True,
    ) -> Tensor:
        """hidden [B, S, D] -> logits [B, S, V], or with targets [B, S] losses [B, S] or their sum; float32 at least.

        `measures`: the first tokens of the sequence are here, whose logits the statistics measure.
        """
        if measures and statistics.sees_beginning():
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


class Stage(nn.Module):
    """A range of blocks, with the embedding on the first stage and norm and head on the last.

    A chain of stages computes what the whole model computes, bit for bit, and a parameter has the same name on each.
    The parameters hold no meaningful values until `model.initialisation.initialise` or a load fills them; under
    torch.device("meta") nothing is allocated. `config` must have passed `model.config.validate_model`.

    Of a model whose head is tied to the embedding, a stage with the head but without the embedding has a copy of its
    own, named embedding.weight. Whoever runs the stages adds up the gradients of both copies before each step, so that
    they stay equal.
    """

    def __init__(self, config: ModelConfig, part: Part):
        super().__init__()
        self.config = config
        self.part = part
        self.activation_checkpointing = "none"
        # This rank among those that share a sequence.
        self.sequence: SequenceContext = LOCAL
        # How blocks run in passes that train (model/compilation.py).
        self.execution = compilation.WRITTEN
        if part.embedding or (part.head and config.tie_embeddings):
            self.embedding = Embedding(config.vocab_size, config.d_model)
        self.blocks = Blocks(config, part.blocks)
        if part.head:
            self.out_norm = norm_class(config.family)(config.d_model, config.norm_eps, "out_norm")
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
            raise ValueError(unknown_mode(mode))
        self._activation_checkpointing = mode

    def forward(
        self,
        inputs: Tensor,
        *,
        targets: Tensor | None = None,
        document_start: Tensor | None = None,
        state: ModelState | None = None,
        return_state: bool = False,
        loss_reduction: str = "none",
        z_loss_weight: float = 0.0,
    ) -> ModelOutput:
        """Run the stage over a stretch of tokens: a training batch, a prompt, or one decoding step.

        Args:
            inputs: tokens [B, S] int64 in [0, V) on a stage with the embedding, else the `hidden` [B, S, D] of the one
                before.
            targets: [B, S] int64; -100 is not scored. With targets the losses are returned, without them the logits.
            document_start: [B, S] bool, True at the first token of each document: every layer starts empty there.
            state: what an earlier call of this stage returned for the tokens before these; None: empty.
            return_state: also return the state behind the last token.
            loss_reduction: "none" returns the losses of the tokens, "sum" their sum alone, which trains faster.
            z_loss_weight: adds z_loss_weight * logsumexp(logits)^2 to the loss of every scored token.

        Raises:
            ValueError: inputs, targets, document_start or state do not fit each other or the stage, or an unknown
                reduction.
        """
        self._check_inputs(inputs, targets, document_start, state)
        if loss_reduction not in _LOSSES:
            raise ValueError(f"loss_reduction must be one of {', '.join(_LOSSES)}, not {loss_reduction!r}")
        x, new_state = self._run_blocks(inputs, document_start, state, return_state)
        if not self.part.head:
            return ModelOutput(hidden=x, state=new_state)
        measures = self.sequence.rank == 0
        result = self.lm_head(self.out_norm(x), targets, loss_reduction, z_loss_weight, measures)
        kind = "logits" if targets is None else {"none": "token_losses", "sum": "loss_sum"}[loss_reduction]
        return ModelOutput(**{kind: result}, targets=targets, state=new_state)

    def advance(
        self, inputs: Tensor, *, document_start: Tensor | None = None, state: ModelState | None = None
    ) -> ModelState:
        """The state behind a stretch of tokens, as `forward` returns it; the head computes nothing.

        Arguments and errors as for `forward`.
        """
        self._check_inputs(inputs, None, document_start, state)
        _, new_state = self._run_blocks(inputs, document_start, state, return_state=True)
        assert new_state is not None
        return new_state

    def predict(
        self, inputs: Tensor, *, document_start: Tensor | None = None, state: ModelState | None = None
    ) -> tuple[Tensor, ModelState]:
        """Logits [B, V] behind the last token of a stretch, and the state there; the head computes no others.

        Arguments, dtypes and errors as for `forward`; of a stage with the head.
        """
        assert self.part.head, "a stage without the head predicts nothing"
        self._check_inputs(inputs, None, document_start, state)
        x, new_state = self._run_blocks(inputs, document_start, state, return_state=True)
        assert new_state is not None
        logits: Tensor = self.lm_head(self.out_norm(x[:, -1:]), measures=False)
        return logits[:, 0], new_state

    def _run_blocks(
        self, inputs: Tensor, document_start: Tensor | None, state: ModelState | None, return_state: bool
    ) -> tuple[Tensor, ModelState | None]:
        """The residual stream behind the last block [B, S, D], and the new state if it is asked for."""
        compilation.begin_pass(self.execution)
        x = self.embedding(inputs) if self.part.embedding else inputs
        block_states = []
        for index, block in enumerate(self.blocks):
            block_state = None if state is None else state.blocks[index]
            x, new_state = block(
                x,
                document_start,
                block_state,
                return_state,
                self.activation_checkpointing,
                self.sequence,
                self.execution,
            )
            block_states.append(new_state)
        return x, ModelState(block_states) if return_state else None

    def _check_inputs(
        self, inputs: Tensor, targets: Tensor | None, document_start: Tensor | None, state: ModelState | None
    ) -> None:
        if self.part.embedding:
            if inputs.dim() != 2 or inputs.dtype != torch.int64 or inputs.numel() == 0:
                raise ValueError(f"tokens must be a non-empty [B, S] int64 tensor, got {_describe(inputs)}")
        elif inputs.dim() != 3 or inputs.shape[-1] != self.config.d_model or not inputs.is_floating_point():
            raise ValueError(
                f"a stage without the embedding takes hidden states [B, S, {self.config.d_model}], got "
                f"{_describe(inputs)}"
            )
        shape = tuple(inputs.shape[:2])
        if targets is not None and not self.part.head:
            raise ValueError("targets were given to a stage without the head; give them to the last one")
        if targets is not None and (targets.shape != shape or targets.dtype != torch.int64):
            raise ValueError(f"targets must be int64 of shape {shape}, got {_describe(targets)}")
        if document_start is not None and (document_start.shape != shape or document_start.dtype != torch.bool):
            raise ValueError(f"document_start must be bool of shape {shape}, got {_describe(document_start)}")
        if state is not None and len(state.blocks) != len(self.blocks):
            raise ValueError(
                f"state is of a {self._what} with {len(state.blocks)} blocks, this {self._what} has {len(self.blocks)}"
            )

    @property
    def _what(self) -> str:
        return "model" if self.part == Part.whole(self.config) else "stage"


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
