"""mLSTM and attention beside each other in one layer: both read the same input, and one projection reads both.

As in Hymba (arXiv 2411.13676) each side's output is normalised by itself and scaled by a learned
vector, and the two are added before the one output projection. Chosen here: the mLSTM in the place of Mamba, the head
norm of this package as the normalisation on both sides, whose weights are the learned vectors, and the sum in the place
of the mean, which those weights can make of it. There are no meta tokens, and no keys are shared between layers.

Axes: B batch, S sequence, D model width, NH heads, DV value dimension of a head.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from model.hardware import Hardware
from model.initial_values import constant, writes_stream
from model.layers import attention, base, mlstm
from model.layers.attention import Attention, AttentionConfig, AttentionDecodingState, AttentionState
from model.layers.base import CellForm, KernelUse, LayerKind, Parameter, StateElements
from model.layers.mlstm import MLSTM, MLSTMConfig
from model.layers.mlstm_cell import CellState
from model.norms import HeadNorm
from model.problems import Problem
from model.projections import Linear
from model.sequence import LOCAL, SequenceContext
from model.state import for_decoding

if TYPE_CHECKING:
    from kernels.preflight import Case
    from model.config import ModelConfig


def _window() -> AttentionConfig:
    return AttentionConfig(n_heads=64, n_kv_heads=64, window=1024)


@dataclass(frozen=True)
class MLSTMAttentionConfig:
    """mLSTM and attention beside each other on the same input, their normed outputs added (arXiv 2411.13676)."""

    # The mLSTM side, as in a block of its own; its values are as wide as the model.
    mlstm: MLSTMConfig = field(default_factory=MLSTMConfig)
    # The attention side, as in a block of its own.
    attention: AttentionConfig = field(default_factory=_window)


@dataclass
class MLSTMAttentionState:
    """The states of both sides."""

    mlstm: CellState
    attention: AttentionState | AttentionDecodingState


@for_decoding.register
def _(state: MLSTMAttentionState, room: int | None = None) -> MLSTMAttentionState:
    return MLSTMAttentionState(for_decoding(state.mlstm, room), for_decoding(state.attention, room))


class MLSTMAttention(nn.Module):
    """out(sigmoid(W_o x) * head_norm(mLSTM(x)) + head_norm(attention(x)))."""

    def __init__(self, d_model: int, settings: MLSTMAttentionConfig, statistics_name: str):
        super().__init__()
        self.mlstm = MLSTM(d_model, settings.mlstm, statistics_name)
        self.attention = Attention(d_model, settings.attention)
        # One projection behind the sum takes the place of theirs.
        self.mlstm.out_proj, self.attention.out_proj = nn.Identity(), nn.Identity()
        self.attention_norm = HeadNorm(d_model, settings.mlstm.head_norm_eps, settings.mlstm.backend)
        self.out_proj = Linear(d_model, d_model)

    def forward(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: MLSTMAttentionState | None,
        return_state: bool,
        sequence: SequenceContext = LOCAL,
    ) -> tuple[Tensor, MLSTMAttentionState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and both states, if asked for."""
        before = (None, None) if state is None else (state.mlstm, state.attention)
        h, cell = self.mlstm(x, document_start, before[0], return_state, sequence)
        heads, cache = self.attention(x, document_start, before[1], return_state, sequence)
        heads = self.attention_norm(heads.unflatten(-1, (self.attention.n_heads, self.attention.head_dim)))
        new_state = MLSTMAttentionState(cell, cache) if return_state else None
        return self.out_proj(h + heads), new_state


class MLSTMAttentionKind(LayerKind):
    name = "mlstm_attention"
    block = "mlstm_attention"
    families = ("xlstm_7b",)
    family_reason = "need the feed-forward layer of the 7B kind"
    settings_class = MLSTMAttentionConfig
    speed_settings = tuple(f"mlstm.{key}" for key in mlstm.KIND.speed_settings)
    first_value_settings = tuple(f"mlstm.{key}" for key in mlstm.KIND.first_value_settings)

    def validate(self, config: ModelConfig, problem: Problem) -> None:
        sides = self._sides(config)
        mlstm.KIND.validate(sides, lambda key, text: problem(f"mlstm.{key}", text))
        attention.KIND.validate(sides, lambda key, text: problem(f"attention.{key}", text))
        factor = self.settings(config).mlstm.v_dim_factor
        if factor != 1.0:
            problem("mlstm.v_dim_factor", f"is {factor}; both sides are added, so it must be 1")

    def module(self, config: ModelConfig, statistics_name: str) -> MLSTMAttention:
        return MLSTMAttention(config.d_model, self.settings(config), statistics_name)

    def parameters(self, config: ModelConfig, block_index: int) -> dict[str, Parameter]:
        sides, d_model = self._sides(config), config.d_model
        found = {
            f"{kind.name}.{name}": parameter
            for kind in (mlstm.KIND, attention.KIND)
            for name, parameter in kind.parameters(sides, block_index).items()
            if name != "out_proj.weight"
        }
        found["attention_norm.weight"] = Parameter((d_model,), base.NORMS, constant(1.0))
        writes = writes_stream(config)
        return found | {
            "out_proj.weight": Parameter((d_model, d_model), base.VALUE_AND_OUTPUT, writes, base.PROJECTIONS)
        }

    def forward_flops(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> dict[str, float]:
        sides = self._sides(config)
        flops = mlstm.KIND.forward_flops(sides, sequence_length, hardware)
        for component, count in attention.KIND.forward_flops(sides, sequence_length, hardware).items():
            flops[component] = flops.get(component, 0.0) + count
        return flops

    def decoding_flops(self, config: ModelConfig, context: int) -> float:
        sides = self._sides(config)
        return mlstm.KIND.decoding_flops(sides, context) + attention.KIND.decoding_flops(sides, context)

    def activation_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        sides, c = self._sides(config), hardware.compute_bytes
        both = sum(kind.activation_bytes(sides, sequence_length, hardware) for kind in (mlstm.KIND, attention.KIND))
        # One norm and its output before both instead of two; the reference of the norm behind has float32 inside.
        of_norm = 0 if hardware.runs_kernels(self.settings(config).mlstm.backend) else 8 * config.d_model
        return both - 2 * c * config.d_model + of_norm

    def chunk_state_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        return mlstm.KIND.chunk_state_bytes(self._sides(config), sequence_length, hardware)

    def cell(self, config: ModelConfig) -> CellForm:
        """The mLSTM's alone: plans leave the time of the attention beside it out, as a layer has one cell there."""
        return mlstm.KIND.cell(self._sides(config))

    def state_elements(self, config: ModelConfig) -> StateElements:
        both = [kind.state_elements(self._sides(config)) for kind in (mlstm.KIND, attention.KIND)]
        fields = [each.name for each in dataclasses.fields(StateElements)]
        return StateElements(**{name: sum(getattr(state, name) for state in both) for name in fields})

    def sequence_problem(self, config: ModelConfig, ranks: int) -> str | None:
        """As for the attention side."""
        problem = attention.KIND.sequence_problem(self._sides(config), ranks)
        return None if problem is None else problem.replace("model.", f"model.layers.{self.name}.")

    def kernel_cases(self, config: ModelConfig, use: KernelUse) -> list[Case]:
        from kernels.preflight import HeadNormCase

        settings: MLSTMAttentionConfig = self.settings(config)
        heads = settings.attention.n_heads
        norm = (use.dtype, use.weight_dtype, settings.mlstm.head_norm_eps, False, settings.mlstm.backend)
        sides = self._sides(config)
        of_both = [*mlstm.KIND.kernel_cases(sides, use), *attention.KIND.kernel_cases(sides, use)]
        return [*of_both, HeadNormCase(heads, config.d_model // heads, *norm)]

    def _sides(self, config: ModelConfig) -> ModelConfig:
        """A configuration of which both kinds read their settings as of blocks of their own."""
        settings: MLSTMAttentionConfig = self.settings(config)
        return dataclasses.replace(config, mlstm=settings.mlstm, attention=settings.attention)


KIND = MLSTMAttentionKind()
