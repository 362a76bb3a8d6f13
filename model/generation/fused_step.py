"""One token a row through a model, with the blocks of the 7B in five launches each where the kernels can take them.

What goes beyond the weights of such a block, which a step reads once, are launches and the small tensors between them
(kernels.decoding). Blocks of other kinds compute as they always do.

Axes: B rows, D model width, V vocabulary, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kernels import decoding
from kernels.backend_choice import triton_runs_on
from kernels.decoding import MixerWeights, NormWeights
from kernels.mlstm.step import DecodingState, mlstm_step
from model import statistics
from model.blocks import Block
from model.language_model import LanguageModel
from model.layers.feed_forward import SwiGLU
from model.layers.mlstm import MLSTM
from model.norms import LayerNorm, RMSNorm
from model.projections import Linear
from model.state import BlockState, ModelState

# By device: what weights must be in. A CPU has the kernels under Triton's interpreter alone, which cannot multiply
# bfloat16.
_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}

Step = Callable[[Tensor, ModelState], tuple[Tensor, ModelState]]


def step_of(model: LanguageModel) -> Step:
    """What takes `model` on by one token a row: tokens [B] int64 and a state -> logits [B, V] and the state behind.

    The state is one made for decoding (ModelState.for_decoding): memories of mLSTM layers are updated where they lie.
    Logits are as Stage.predict has them. Nothing changes the model's weights or moves them between steps.
    """

    def ordinary(tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        return model.predict(tokens[:, None], state=state)

    takes = [_takes(block) for block in model.blocks]
    if not any(takes) or not _can_be_read([model.embedding.weight, model.lm_head.weight]):
        return ordinary

    def fused(tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        if tokens.shape[0] > decoding.MAX_ROWS or statistics.is_recording() or torch.is_grad_enabled():
            return ordinary(tokens, state)
        return _step(model, takes, tokens, state)

    return fused


def _takes(block: Block) -> bool:
    """Whether the kernels can compute the block, with a state made for decoding."""
    if type(block.mixer) is not MLSTM or type(block.ffn) is not SwiGLU or type(block.mixer_norm) is not RMSNorm:
        return False
    mixer = block.mixer
    return (
        _can_be_read(block.parameters())
        and mixer.settings.backend != "reference"
        and max(mixer.q_proj.in_features, mixer.cell.v_width) <= decoding.MAX_NORM_WIDTH
    )


def _can_be_read(weights: Iterable[Tensor]) -> bool:
    """Whether the kernels take weights such as these."""
    return all(
        triton_runs_on(weight)
        and decoding.has_room_for_tiles(weight.device)
        and weight.dtype == _DTYPES[weight.device.type]
        and weight.is_contiguous()
        for weight in weights
    )


def _step(model: LanguageModel, takes: list[bool], tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
    x = model.embedding(tokens)
    new: list[BlockState] = []
    for block, taken, before in zip(model.blocks, takes, state.blocks, strict=True):
        if taken and isinstance(before, DecodingState):
            x = _through_block(block, x, before)
            new.append(before)
        else:
            y, behind = block(x[:, None], state=before, return_state=True)
            assert behind is not None
            x = y[:, 0]
            new.append(behind)
    head = model.lm_head
    return decoding.logits(x, _weights(model.out_norm), head.weight, head.soft_cap, backend="triton"), ModelState(new)


def _through_block(block: Block, x: Tensor, state: DecodingState) -> Tensor:
    """x [B, D] -> [B, D]; the state moves on."""
    mixer, ffn = block.mixer, block.ffn
    assert isinstance(mixer, MLSTM) and isinstance(mixer.out_proj, Linear) and isinstance(ffn, SwiGLU)
    settings, cell = mixer.settings, mixer.cell
    weights = MixerWeights(
        mixer.q_proj.weight,
        mixer.k_proj.weight,
        mixer.v_proj.weight,
        mixer.output_gate.weight,
        mixer.igate.weight,
        mixer.igate.bias,
        mixer.fgate.weight,
        mixer.fgate.bias,
    )
    opened = decoding.mixer_inputs(x, _weights(block.mixer_norm), weights, settings.gate_soft_cap, backend="triton")
    widths = [cell.qk_width, cell.qk_width, cell.v_width, cell.v_width]
    q, k, v, output_gate = opened.features.split(widths, dim=1)
    igate, fgate = opened.gates.chunk(2, dim=1)
    q, k, v = (part.unflatten(1, (cell.heads, -1)) for part in (q, k, v))
    h = mlstm_step(
        q,
        k,
        v,
        igate,
        fgate,
        state,
        gate=cell.gate,
        normaliser=cell.normaliser,
        eps=cell.eps,
        backend=cell.backend,
    )
    head_norm = NormWeights(mixer.head_norm.weight, mixer.head_norm.eps)
    x = decoding.mixer_output(h, output_gate, head_norm, mixer.out_proj.weight, x, backend="triton")
    inner = decoding.swiglu(x, _weights(block.ffn_norm), ffn.gate_proj.weight, ffn.up_proj.weight, backend="triton")
    return decoding.added_product(inner, ffn.down_proj.weight, x, backend="triton")


def _weights(norm: RMSNorm | LayerNorm) -> NormWeights:
    return NormWeights(norm.weight, norm.eps)
