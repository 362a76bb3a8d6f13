"""transformers' Llama: models of attention blocks alone.

Both pair feature j of a head with feature j + DH / 2 in the rotary embedding (model/layers/attention.py, `rotate`), and
heads share keys and values alike, so weights are carried over as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from model.config import AttentionConfig, ModelConfig
from model.huggingface.base import HEAD, Format, Tensors, layout_of_blocks, tensor_shape

_BLOCK_NAMES = {
    "mixer_norm.weight": "input_layernorm.weight",
    "mixer.q_proj.weight": "self_attn.q_proj.weight",
    "mixer.k_proj.weight": "self_attn.k_proj.weight",
    "mixer.v_proj.weight": "self_attn.v_proj.weight",
    "mixer.out_proj.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate_proj.weight": "mlp.gate_proj.weight",
    "ffn.up_proj.weight": "mlp.up_proj.weight",
    "ffn.down_proj.weight": "mlp.down_proj.weight",
}
_EMBEDDING = "model.embed_tokens.weight"
_OUTER_NAMES = {"embedding.weight": _EMBEDDING, "out_norm.weight": "model.norm.weight", HEAD: HEAD}
# Of Llama's first releases: a buffer that older files hold, and the base of rotary frequencies where none is named.
_BUFFER = "rotary_emb.inv_freq"
_FIRST_ROPE_THETA = 10000.0


class LlamaFormat(Format):
    name = "Llama"
    model_type = "llama"
    ties_head = True

    def is_for(self, config: ModelConfig) -> bool:
        return set(config.block_kinds()) == {"attention"}

    def inexpressible(self, config: ModelConfig) -> list[str]:
        attention, reasons = config.attention, []
        assert attention is not None
        if config.logit_soft_cap is not None:
            reasons.append(f"model.logit_soft_cap={config.logit_soft_cap}: the logits have no soft cap there")
        if attention.positions != "rotary":
            reasons.append(f"model.attention.positions={attention.positions}: positions are always rotary there")
        if attention.window is not None:
            reasons.append(f"model.attention.window={attention.window}: attention sees all earlier tokens there")
        if attention.sinks:
            reasons.append("model.attention.sinks=true: the softmax has no sinks there")
        return reasons

    def config_json(self, config: ModelConfig, dtype: torch.dtype, sequence_length: int | None) -> dict[str, Any]:
        attention = config.attention
        assert attention is not None
        # Programs take it for the longest text; where it is left out transformers has 2048.
        length = {} if sequence_length is None else {"max_position_embeddings": sequence_length}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": config.ffn_dim,
            "num_hidden_layers": config.n_blocks,
            "num_attention_heads": attention.n_heads,
            "num_key_value_heads": attention.n_kv_heads,
            "head_dim": config.d_model // attention.n_heads,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "rope_theta": attention.rope_theta,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": config.tie_embeddings,
            "use_cache": True,
            "dtype": str(dtype).removeprefix("torch."),
            **length,
        }

    def unreadable(self, values: dict[str, Any]) -> list[str]:
        reasons = [
            f"{key} is true: our linear maps have no biases"
            for key in ("attention_bias", "mlp_bias")
            if values.get(key)
        ]
        if values.get("hidden_act", "silu") != "silu":
            reasons.append(f"hidden_act is {values['hidden_act']!r}, not 'silu'")
        missing = [key for key in ("hidden_size", "num_attention_heads", "num_hidden_layers") if key not in values]
        reasons += [f"{key} is missing" for key in missing]
        if not missing and values.get("head_dim") is not None:
            heads, width = values["num_attention_heads"], values["hidden_size"]
            if heads * values["head_dim"] != width:
                reasons.append(f"{heads} heads of head_dim {values['head_dim']} do not make up hidden_size {width}")
        rope = _rope(values)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            reasons.append(f"rotary frequencies of type {kind!r}: ours are never scaled")
        return reasons

    def model_config(self, directory: Path, values: dict[str, Any], tensors: Tensors) -> ModelConfig:
        vocab_size, d_model = tensor_shape(directory, tensors, _EMBEDDING, "a Llama")
        heads = int(values["num_attention_heads"])
        return ModelConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            n_blocks=int(values["num_hidden_layers"]),
            block="attention",
            ffn_dim=tensor_shape(directory, tensors, "model.layers.0.mlp.down_proj.weight", "a Llama")[1],
            norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            logit_soft_cap=None,
            tie_embeddings=bool(values.get("tie_word_embeddings", False)) and HEAD not in tensors,
            attention=AttentionConfig(
                n_heads=heads,
                n_kv_heads=int(values.get("num_key_value_heads") or heads),
                rope_theta=float(_rope(values).get("rope_theta", _FIRST_ROPE_THETA)),
            ),
        )

    def tensor_layout(self, names: Iterable[str], values: dict[str, Any]) -> dict[str, list[str]]:
        layout = layout_of_blocks(names, "model.layers", _BLOCK_NAMES, _OUTER_NAMES)
        return {theirs: [ours] for ours, theirs in layout.items()}

    def usual_names(self, tensors: Tensors) -> Tensors:
        return {name: read for name, read in tensors.items() if not name.endswith(_BUFFER)}


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of the rotary embedding, wherever a release of transformers keeps them."""
    theta = {"rope_theta": values["rope_theta"]} if values.get("rope_theta") is not None else {}
    return theta | (values.get("rope_scaling") or {}) | (values.get("rope_parameters") or {})
