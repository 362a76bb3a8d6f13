"""Reads a Hugging Face xLSTM directory, without transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.config import MLSTMConfig, ModelConfig, validate_model
from model.huggingface.names import CONFIG, INDEX, WEIGHTS, HuggingFaceError, tensor_layout
from model.parameters import parameter_shapes

# Name in the original xlstm package, whose tensors are named alike but for this one.
_OLDER_EMBEDDING = "embedding.weight"
_EMBEDDING = "backbone.embeddings.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a safetensors file, not read yet."""

    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of the first axis."""
        rows: torch.Tensor = self.file.get_slice(self.name)[start:end]
        return rows


Tensors = dict[str, _Tensor]


class HuggingFaceReader:
    """Random access to a Hugging Face xLSTM directory; `shapes` maps every parameter of ours to its shape.

    Understands single and fused weights, one file or shards with an index, and the older names of keys in config.json
    and of the embedding. All widths are taken from the tensors, so that no rounding rule matters. Does not need
    `transformers`, and reads no weights before it is asked for them.

    Raises HuggingFaceError with every reason why the directory is not such a model, or is incomplete.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        values = _read_config(directory)
        self._tensors = _open_tensors(directory)
        self.config = _config_from(directory, values, self._tensors)
        problems = validate_model(self.config)
        if problems:
            raise HuggingFaceError(f"{directory} describes a model that does not work", problems)
        self.shapes = parameter_shapes(self.config)
        layout = tensor_layout(self.shapes, fused=_is_fused(values))
        reasons = [f"tensor {name} is missing" for name in layout if name not in self._tensors]
        reasons += [f"tensor {name} is unknown" for name in sorted(set(self._tensors) - set(layout))]
        if reasons:
            raise HuggingFaceError(f"{directory} does not hold the weights that its {CONFIG} describes", reasons)
        # Our parameter -> their tensor, and its first row there.
        self._places: dict[str, tuple[str, int]] = {}
        for theirs, names in layout.items():
            rows = 0
            for name in names:
                self._places[name] = theirs, rows
                rows += self.shapes[name][0]
            found, expected = self._tensors[theirs].shape, (rows, *self.shapes[names[0]][1:])
            if found != expected:
                reasons.append(f"{theirs} has shape {list(found)} instead of {list(expected)}")
        if reasons:
            raise HuggingFaceError(f"{directory} holds tensors of wrong shapes", reasons)

    def read_range(self, name: str, offset: int, numel: int) -> torch.Tensor:
        """Elements [offset, offset + numel) of our flattened parameter `name`, on the CPU, in the dtype on disk."""
        theirs, first_row = self._places[name]
        of_row = math.prod(self.shapes[name][1:])
        start, end = offset // of_row, -(-(offset + numel) // of_row)
        rows = self._tensors[theirs].rows(first_row + start, first_row + end)
        return rows.reshape(-1).narrow(0, offset - start * of_row, numel)


def import_huggingface(directory: str | Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Read a Hugging Face xLSTM directory: the configuration, and {our parameter name: tensor} in the dtype on disk.

    Raises as HuggingFaceReader does.
    """
    reader = HuggingFaceReader(directory)
    whole = {name: reader.read_range(name, 0, math.prod(shape)).view(shape) for name, shape in reader.shapes.items()}
    return reader.config, whole


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise HuggingFaceError(f"{directory} is no Hugging Face model directory", [f"{path} does not exist"])
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HuggingFaceError(f"{path} cannot be read", [str(error)]) from None
    reasons = []
    if values.get("model_type") != "xlstm":
        reasons.append(f"model_type is {values.get('model_type')!r}, not 'xlstm'")
    if values.get("use_bias"):
        reasons.append("use_bias is true: our linear maps have no biases")
    if values.get("add_out_norm") is False:
        reasons.append("add_out_norm is false: our models have a norm before the head")
    if values.get("weight_mode", "single") not in ("single", "fused"):
        reasons.append(f"weight_mode is {values['weight_mode']!r}, not single or fused")
    if reasons:
        raise HuggingFaceError(f"{path} describes a model that cannot be imported", reasons)
    return values


def _config_from(directory: Path, values: dict[str, Any], tensors: Tensors) -> ModelConfig:
    """Our configuration from config.json, with current and older key names, and the shapes of the first tensors."""

    def value(default: Any, *keys: str) -> Any:
        return next((values[key] for key in keys if values.get(key) is not None), default)

    def optional(default: float, key: str) -> float | None:
        given: float | None = values.get(key, default)
        return given

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise HuggingFaceError(f"{directory} does not hold an xLSTM", [f"tensor {name} is missing"])
        return tensors[name].shape

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
        tie_embeddings=bool(values.get("tie_word_embeddings", False)) and _HEAD not in tensors,
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


def _is_fused(values: dict[str, Any]) -> bool:
    return values.get("weight_mode") == "fused"


def _open_tensors(directory: Path) -> Tensors:
    """Tensor name -> tensor, of one file or of the shards of an index."""
    index = directory / INDEX
    if index.is_file():
        paths = [directory / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        paths = [directory / WEIGHTS]
    absent = [f"{path} does not exist" for path in paths if not path.is_file()]
    if absent:
        raise HuggingFaceError(f"{directory} has no complete safetensors weights", absent)
    tensors = {tensor.name: tensor for path in paths for tensor in _tensors_in(path)}
    if _OLDER_EMBEDDING in tensors:
        tensors[_EMBEDDING] = tensors.pop(_OLDER_EMBEDDING)
    return tensors


def _tensors_in(path: Path) -> Iterator[_Tensor]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise HuggingFaceError(f"{path} cannot be read (damaged or cut short)", [str(error)]) from None
    for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
        yield _Tensor(file, name)
