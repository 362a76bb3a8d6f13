"""Reads a Hugging Face directory of an xLSTM or a Llama, without transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.config import ModelConfig, validate_model
from model.huggingface.base import CONFIG, INDEX, WEIGHTS, Format, HuggingFaceError, Tensors
from model.huggingface.formats import FORMATS
from model.parameters import parameter_shapes


def import_huggingface(directory: str | Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Read an xLSTM or a Llama: its configuration, and {our parameter name: tensor} in the dtype on disk.

    Understands single and fused weights, one file or shards with an index, and the older names of keys in config.json
    and of the embedding. All widths are taken from the tensors, so that no rounding rule matters. Does not need
    `transformers`.

    Raises:
        HuggingFaceError: with every reason why the directory is not such a model, or is incomplete.
    """
    directory = Path(directory)
    source, values = _read_config(directory)
    tensors = source.usual_names(_open_tensors(directory))
    config = source.model_config(directory, values, tensors)
    problems = validate_model(config)
    if problems:
        raise HuggingFaceError(f"{directory} describes a model that does not work", problems)
    shapes = parameter_shapes(config)
    layout = source.tensor_layout(shapes, values)
    reasons = [f"tensor {name} is missing" for name in layout if name not in tensors]
    reasons += [f"tensor {name} is unknown" for name in sorted(set(tensors) - set(layout))]
    if reasons:
        raise HuggingFaceError(f"{directory} does not hold the weights that its {CONFIG} describes", reasons)
    state_dict: dict[str, torch.Tensor] = {}
    for theirs, names in layout.items():
        tensor = tensors[theirs]()
        rows = [shapes[name][0] for name in names]
        expected = (sum(rows), *shapes[names[0]][1:])
        if tuple(tensor.shape) != expected:
            reasons.append(f"{theirs} has shape {list(tensor.shape)} instead of {list(expected)}")
            continue
        state_dict |= zip(names, tensor.split(rows), strict=True)
    if reasons:
        raise HuggingFaceError(f"{directory} holds tensors of wrong shapes", reasons)
    return config, {name: state_dict[name] for name in shapes}


def _read_config(directory: Path) -> tuple[Format, dict[str, Any]]:
    path = directory / CONFIG
    if not path.is_file():
        raise HuggingFaceError(f"{directory} is no Hugging Face model directory", [f"{path} does not exist"])
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HuggingFaceError(f"{path} cannot be read", [str(error)]) from None
    known = {source.model_type: source for source in FORMATS}
    source = known.get(values.get("model_type"))
    if source is None:
        reasons = [f"model_type is {values.get('model_type')!r}, not {' or '.join(sorted(known))}"]
    else:
        reasons = source.unreadable(values)
    if source is None or reasons:
        raise HuggingFaceError(f"{path} describes a model that cannot be imported", reasons)
    return source, values


def _open_tensors(directory: Path) -> Tensors:
    """Tensor name -> function that reads it, from one file or from the shards of an index."""
    index = directory / INDEX
    if index.is_file():
        paths = [directory / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        paths = [directory / WEIGHTS]
    absent = [f"{path} does not exist" for path in paths if not path.is_file()]
    if absent:
        raise HuggingFaceError(f"{directory} has no complete safetensors weights", absent)
    return {name: read for path in paths for name, read in _readers(path)}


def _readers(path: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise HuggingFaceError(f"{path} cannot be read (damaged or cut short)", [str(error)]) from None
    for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
        yield name, functools.partial(file.get_tensor, name)
