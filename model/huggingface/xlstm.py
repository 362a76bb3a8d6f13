"""transformers' xLSTM: exactly one architecture, the 7B block with exponential gates, so everything else is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from model.config import MLSTMConfig, ModelConfig
from model.huggingface.base import HEAD, Format, Tensors, layout_of_blocks, tensor_shape
from model.layers import layer_kinds

# The factor of the feed-forward width is given with a multiple that it is rounded up to.
FFN_ALIGNMENT = 64
# Name in the original xlstm package, whose tensors are named alike but for this one.
_OLDER_EMBEDDING = "embedding.weight"
_EMBEDDING = "backbone.embeddings.weight"

_BLOCK_NAMES = {
    "mixer_norm.weight": "norm_mlstm.weight",
    "mixer.q_proj.weight": "mlstm_layer.q.weight",
    "mixer.k_proj.weight": "mlstm_layer.k.weight",
    "mixer.v_proj.weight": "mlstm_layer.v.weight",
    "mixer.output_gate.weight": "mlstm_layer.ogate_preact.weight",
    "mixer.igate.weight": "mlstm_layer.igate_preact.weight",
    "mixer.igate.bias": "mlstm_layer.igate_preact.bias",
    "mixer.fgate.weight": "mlstm_layer.fgate_preact.weight",
    "mixer.fgate.bias": "mlstm_layer.fgate_preact.bias",
    "mixer.head_norm.weight": "mlstm_layer.multihead_norm.weight",
    "mixer.out_proj.weight": "mlstm_layer.out_proj.weight",
    "ffn_norm.weight": "norm_ffn.weight",
    "ffn.gate_proj.weight": "ffn.proj_up_gate.weight",
    "ffn.up_proj.weight": "ffn.proj_up.weight",
    "ffn.down_proj.weight": "ffn.proj_down.weight",
}
# weight_mode="fused": one tensor holds the rows of several of ours, in the order of our parameters.
_FUSED_NAMES = {
    "mixer.q_proj.weight": "mlstm_layer.qkv_opreact.weight",
    "mixer.k_proj.weight": "mlstm_layer.qkv_opreact.weight",
    "mixer.v_proj.weight": "mlstm_layer.qkv_opreact.weight",
    "mixer.output_gate.weight": "mlstm_layer.qkv_opreact.weight",
    "mixer.igate.weight": "mlstm_layer.ifgate_preact.weight",
    "mixer.fgate.weight": "mlstm_layer.ifgate_preact.weight",
    "mixer.igate.bias": "mlstm_layer.ifgate_preact.bias",
    "mixer.fgate.bias": "mlstm_layer.ifgate_preact.bias",
    "ffn.gate_proj.weight": "ffn.proj_up_gate_z.weight",
    "ffn.up_proj.weight": "ffn.proj_up_gate_z.weight",
}
_OUTER_NAMES = {
    "embedding.weight": "backbone.embeddings.weight",
    "out_norm.weight": "backbone.out_norm.weight",
    "lm_head.weight": "lm_head.weight",
}


class XLSTMFormat(Format):
    name = "xLSTM"
    model_type = "xlstm"
    # The published 7B has a head of its own, and its code unties what is tied.
    ties_head = False

    def is_for(self, config: ModelConfig) -> bool:
        return True

    def inexpressible(self, config: ModelConfig) -> list[str]:
        reasons = []
        if config.family != "xlstm_7b":
            reasons.append(f"model.family={config.family}: only the block of the 7B family exists there")
        kinds = layer_kinds(config)
        for kind in dict.fromkeys(kinds):
            positions = [index for index, other in enumerate(kinds) if other is kind]
            reasons += kind.huggingface_reasons(config, positions)
        if config.logit_soft_cap is None:
            reasons.append("model.logit_soft_cap=null: the logits always have a soft cap there")
        return reasons

    def config_json(self, config: ModelConfig, dtype: torch.dtype, sequence_length: int | None) -> dict[str, Any]:
        mlstm, ffn_dim = config.mlstm, config.ffn_dim
        assert mlstm is not None and ffn_dim is not None and mlstm.gate_soft_cap is not None
        assert config.logit_soft_cap is not None
        multiple = math.gcd(ffn_dim, FFN_ALIGNMENT)

        def rounded_up(width: float) -> int:
            return int((width + multiple - 1) // multiple * multiple)

        return {
            "architectures": ["xLSTMForCausalLM"],
            "model_type": "xlstm",
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "embedding_dim": config.d_model,
            "num_hidden_layers": config.n_blocks,
            "num_blocks": config.n_blocks,
            "num_heads": mlstm.n_heads,
            "qk_dim_factor": _factor(mlstm.qk_width(config.d_model), config.d_model, int),
            "v_dim_factor": _factor(mlstm.v_width(config.d_model), config.d_model, int),
            "ffn_proj_factor": _factor(ffn_dim, config.d_model, rounded_up),
            "ffn_round_up_to_multiple_of": multiple,
            "use_bias": False,
            "add_out_norm": True,
            "tie_word_embeddings": False,
            "norm_eps": config.norm_eps,
            "norm_reduction_force_float32": True,
            "eps": mlstm.cell_eps,
            "gate_soft_cap": float(mlstm.gate_soft_cap),
            "output_logit_soft_cap": float(config.logit_soft_cap),
            "weight_mode": "single",
            "mode": "inference",
            "chunk_size": mlstm.reference_chunk_size,
            "chunkwise_kernel": "chunkwise--native_autograd",
            "sequence_kernel": "native_sequence__native",
            "step_kernel": "native",
            "autocast_kernel_dtype": str(dtype).removeprefix("torch."),
            "inference_state_dtype": "float32",
            "return_last_states": True,
            "use_cache": True,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def unreadable(self, values: dict[str, Any]) -> list[str]:
        reasons = []
        if values.get("use_bias"):
            reasons.append("use_bias is true: our linear maps have no biases")
        if values.get("add_out_norm") is False:
            reasons.append("add_out_norm is false: our models have a norm before the head")
        if values.get("weight_mode", "single") not in ("single", "fused"):
            reasons.append(f"weight_mode is {values['weight_mode']!r}, not single or fused")
        return reasons

    def model_config(self, directory: Path, values: dict[str, Any], tensors: Tensors) -> ModelConfig:
        # Current and older names of keys.
        def value(default: Any, *keys: str) -> Any:
            return next((values[key] for key in keys if values.get(key) is not None), default)

        def optional(default: float, key: str) -> float | None:
            given: float | None = values.get(key, default)
            return given

        def shape(name: str) -> tuple[int, ...]:
            return tensor_shape(directory, tensors, name, "an xLSTM")

        block = "backbone.blocks.0"
        vocab_size, d_model = shape(_EMBEDDING)
        (v_dim,) = shape(f"{block}.mlstm_layer.multihead_norm.weight")
        if _is_fused(values):
            qk_dim = (shape(f"{block}.mlstm_layer.qkv_opreact.weight")[0] - 2 * v_dim) // 2
        else:
            qk_dim = shape(f"{block}.mlstm_layer.q.weight")[0]
        bias_init = value(-10.0, "igate_bias_init_range")
        norm_eps = float(value(1e-6, "norm_eps"))
        return ModelConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            n_blocks=int(value(32, "num_hidden_layers", "num_blocks")),
            ffn_dim=shape(f"{block}.ffn.proj_down.weight")[1],
            norm_eps=norm_eps,
            logit_soft_cap=optional(30.0, "output_logit_soft_cap"),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)) and HEAD not in tensors,
            mlstm=MLSTMConfig(
                n_heads=int(value(8, "num_heads")),
                qk_dim_factor=qk_dim / d_model,
                v_dim_factor=v_dim / d_model,
                gate_soft_cap=optional(15.0, "gate_soft_cap"),
                igate_bias_init=float(bias_init[0] if isinstance(bias_init, list) else bias_init),
                head_norm_eps=float(value(norm_eps, "cell_norm_eps")),
                cell_eps=float(value(1e-6, "eps")),
                reference_chunk_size=int(value(64, "chunk_size")),
            ),
        )

    def tensor_layout(self, names: Iterable[str], values: dict[str, Any]) -> dict[str, list[str]]:
        block = _BLOCK_NAMES | _FUSED_NAMES if _is_fused(values) else _BLOCK_NAMES
        layout: dict[str, list[str]] = {}
        for ours, theirs in layout_of_blocks(names, "backbone.blocks", block, _OUTER_NAMES).items():
            layout.setdefault(theirs, []).append(ours)
        return layout

    def usual_names(self, tensors: Tensors) -> Tensors:
        return {_EMBEDDING if name == _OLDER_EMBEDDING else name: read for name, read in tensors.items()}


def _is_fused(values: dict[str, Any]) -> bool:
    return values.get("weight_mode") == "fused"


def _factor(width: int, d_model: int, rounded: Callable[[float], int]) -> float:
    """A factor from which transformers computes `width`: the quotient may fall short of it by one rounding."""
    factor = width / d_model
    if rounded(d_model * factor) != width:
        factor = math.nextafter(factor, math.inf)
    assert rounded(d_model * factor) == width, f"no factor of {d_model} gives {width}"
    return factor
