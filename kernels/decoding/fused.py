"""The products of a decoding step on their Triton kernels, as operators.

One row: each is one launch, and every program normalises the row for itself. Several rows: that would be more reading
than the weights are, and the norm is a launch of its own.

Axes: M rows, K inputs, N outputs, D model width, F inner width, V vocabulary, NH heads, DV value dimension of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.decoding import dot_kernels, row_kernels, tiles
from kernels.decoding.inputs import MixerInputs, MixerWeights, NormWeights
from kernels.decoding.tiles import Tile
from kernels.head_norm.fused import launch_forward
from kernels.integers import ceil_div, next_power_of_two
from kernels.operators import operator

# Rows of inputs that tensor cores take at least.
_LEAST_ROWS = 16


def _width(elements: int) -> int:
    """The power of two that holds so many elements."""
    return max(16, next_power_of_two(elements))


def _row_settings(tile: Tile, width: int) -> dict[str, int]:
    return _settings(tile) | {"WIDTH": _width(width)}


def _dot_settings(tile: Tile, rows: int) -> dict[str, int]:
    return _settings(tile) | {"BLOCK_M": max(_LEAST_ROWS, next_power_of_two(rows))}


def _settings(tile: Tile) -> dict[str, int]:
    # The number of stages is that of the loops. What Triton takes under that name it would use for all loops.
    return {
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.num_stages,
        "num_warps": tile.num_warps,
    }


def _cap(cap: float | None) -> float:
    return 1.0 if cap is None else cap


def _normed(x: Tensor, norm: NormWeights) -> Tensor:
    """rms_norm(x) [M, K] in x's dtype."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, inputs = x.shape
    width = _width(inputs)
    warps = min(16, max(4, width // 1024))
    row_norm = dot_kernels.rms_norm_kernel
    row_norm[(rows,)](x, norm.norm_weight, y, norm.eps, K=inputs, WIDTH=width, num_warps=warps)
    return y


@operator("decoding_mixer_inputs")
def mixer_inputs(x: Tensor, norm: NormWeights, weights: MixerWeights, gate_cap: float | None) -> MixerInputs:
    """As kernels.decoding.mixer_inputs."""
    rows, inputs = x.shape
    qk_width, v_width, heads = (matrix.shape[0] for matrix in (weights.q, weights.v, weights.igate))
    result = _empty_mixer_inputs(x, weights)
    tile = tiles.choose(rows, 2 * (qk_width + v_width), inputs)
    programs = 2 * sum(ceil_div(outputs, tile.block_n) for outputs in (qk_width, v_width, heads))
    sizes = {"QK": qk_width, "V": v_width, "NH": heads, "K": inputs, "HAS_CAP": gate_cap is not None}
    cap = _cap(gate_cap)
    with torch.cuda.device_of(x):
        if rows == 1:
            settings = _row_settings(tile, inputs)
            row_kernels.projections_kernel[(programs,)](
                x.contiguous(), norm.norm_weight, *weights, *result, norm.eps, cap, **sizes, **settings
            )
        else:
            settings = _dot_settings(tile, rows)
            dot_kernels.projections_kernel[(programs,)](
                _normed(x, norm), rows, *weights, *result, cap, **sizes, **settings
            )
    return result


@mixer_inputs.fake
def _(x: Tensor, norm: NormWeights, weights: MixerWeights, gate_cap: float | None) -> MixerInputs:
    return _empty_mixer_inputs(x, weights)


def _empty_mixer_inputs(x: Tensor, weights: MixerWeights) -> MixerInputs:
    features = 2 * (weights.q.shape[0] + weights.v.shape[0])
    gates = 2 * weights.igate.shape[0]
    return MixerInputs(
        x.new_empty(x.shape[0], features), torch.empty(x.shape[0], gates, dtype=torch.float32, device=x.device)
    )


@operator("decoding_mixer_output")
def mixer_output(h: Tensor, gate_preact: Tensor, norm: NormWeights, weight: Tensor, residual: Tensor) -> Tensor:
    """As kernels.decoding.mixer_output."""
    if h.shape[0] > 1:
        gated = launch_forward(h[:, None], gate_preact[:, None], *norm)
        return _added_product(gated[:, 0], weight, residual)
    y = torch.empty_like(residual)
    _, heads, head_dim = h.shape
    width, heads_held = next_power_of_two(head_dim), next_power_of_two(heads)
    outputs = weight.shape[0]
    tile = tiles.choose_whole(outputs, heads_held * width)
    with torch.cuda.device_of(h):
        row_kernels.gated_product_kernel[(ceil_div(outputs, tile.block_n),)](
            h.contiguous(),
            gate_preact.contiguous(),
            norm.norm_weight,
            weight,
            residual,
            y,
            norm.eps,
            N=outputs,
            NH=heads,
            DV=head_dim,
            HEADS=heads_held,
            WIDTH=width,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
        )
    return y


@operator("decoding_swiglu")
def swiglu(x: Tensor, norm: NormWeights, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """As kernels.decoding.swiglu."""
    rows, inputs = x.shape
    outputs = gate_weight.shape[0]
    y = x.new_empty(rows, outputs)
    tile = tiles.choose(rows, outputs, inputs, weights=2)
    grid, sizes = (ceil_div(outputs, tile.block_n),), {"N": outputs, "K": inputs}
    with torch.cuda.device_of(x):
        if rows == 1:
            settings = _row_settings(tile, inputs)
            row_kernels.swiglu_kernel[grid](
                x.contiguous(), norm.norm_weight, gate_weight, up_weight, y, norm.eps, **sizes, **settings
            )
        else:
            settings = _dot_settings(tile, rows)
            dot_kernels.swiglu_kernel[grid](_normed(x, norm), rows, gate_weight, up_weight, y, **sizes, **settings)
    return y


@operator("decoding_added_product")
def added_product(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """As kernels.decoding.added_product."""
    return _added_product(x, weight, residual)


@operator("decoding_logits")
def logits(x: Tensor, norm: NormWeights, weight: Tensor, cap: float | None) -> Tensor:
    """As kernels.decoding.logits."""
    return _product(x, norm, weight, None, cap)


def _added_product(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """residual + weight x: [M, N] in residual's dtype."""
    if x.shape[0] > tiles.MOST_ROWS_OF_PLAIN_PRODUCTS:
        return torch.addmm(residual, x, weight.t())
    return _product(x, None, weight, residual, None)


def _product(x: Tensor, norm: NormWeights | None, weight: Tensor, residual: Tensor | None, cap: float | None) -> Tensor:
    """soft_cap(weight rms_norm(x) + residual): [M, N] in residual's dtype, without one in float32."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    dtype = torch.float32 if residual is None else residual.dtype
    y = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    tile = tiles.choose(rows, outputs, inputs)
    grid, sizes = (ceil_div(outputs, tile.block_n),), {"N": outputs, "K": inputs, "HAS_CAP": cap is not None}
    with torch.cuda.device_of(x):
        if rows == 1:
            norm_weight, eps = (None, 0.0) if norm is None else norm
            settings = _row_settings(tile, inputs)
            row_kernels.product_kernel[grid](
                x.contiguous(), norm_weight, weight, residual, y, eps, _cap(cap), **sizes, **settings
            )
        else:
            x = x.contiguous() if norm is None else _normed(x, norm)
            settings = _dot_settings(tile, rows)
            dot_kernels.product_kernel[grid](x, rows, weight, residual, y, _cap(cap), **sizes, **settings)
    return y


@mixer_output.fake
def _(h: Tensor, gate_preact: Tensor, norm: NormWeights, weight: Tensor, residual: Tensor) -> Tensor:
    return torch.empty_like(residual)


@swiglu.fake
def _(x: Tensor, norm: NormWeights, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], gate_weight.shape[0])


@added_product.fake
def _(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return torch.empty_like(residual)


@logits.fake
def _(x: Tensor, norm: NormWeights, weight: Tensor, cap: float | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
