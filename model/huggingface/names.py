"""What both directions share: the names of tensors in transformers' xLSTM, and the error."""

from __future__ import annotations

from collections.abc import Iterable

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

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


class HuggingFaceError(ValueError):
    """An export or import that cannot be done; the message holds every reason."""

    def __init__(self, what: str, reasons: list[str]):
        self.reasons = reasons
        super().__init__(f"{what}:\n" + "\n".join(f"  - {reason}" for reason in reasons))


def tensor_layout(names: Iterable[str], *, fused: bool) -> dict[str, list[str]]:
    """Their tensor -> the parameters of ours (`names`, in the model's order) whose rows it holds, first to last."""
    layout: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            theirs = _FUSED_NAMES.get(rest, _BLOCK_NAMES[rest]) if fused else _BLOCK_NAMES[rest]
            theirs = f"backbone.blocks.{index}.{theirs}"
        else:
            theirs = _OUTER_NAMES[name]
        layout.setdefault(theirs, []).append(name)
    return layout
