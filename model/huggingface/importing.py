"""Reads a Hugging Face directory of an xLSTM, a Llama or a model of ours, without transformers."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from conf.named_files import unsafe_file
from model.config import ModelConfig, validate_model
from model.huggingface.base import CONFIG, Format, HuggingFaceError, StoredTensor, Tensors
from model.huggingface.formats import FORMATS
from model.parameters import parameter_shapes
from model.whole_tensors import INDEX, WEIGHTS


class HuggingFaceReader:
    """Random access to a Hugging Face directory; `shapes` maps our parameters to their shapes.

    Understands single and fused weights, one file or shards with an index, and the older names of keys in config.json
    and of the embedding. All widths of an xLSTM or a Llama are taken from the tensors, so that no rounding rule
    matters. Does not need `transformers`, runs nothing of the directory, and reads no weights before it is asked for
    them.

    Raises HuggingFaceError with every reason why the directory is not such a model, or is incomplete.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        source, values = _read_config(directory)
        self._tensors = source.usual_names(_open_tensors(directory))
        with _values_that_fit(directory / CONFIG):
            self.config = source.model_config(directory, values, self._tensors)
        problems = validate_model(self.config)
        if problems:
            raise HuggingFaceError(f"{directory} describes a model that does not work", problems)
        self.shapes = parameter_shapes(self.config)
        layout = source.tensor_layout(self.shapes, values)
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
    """Read a model: its configuration, and {our parameter name: tensor} in the dtype on disk.

    Raises as HuggingFaceReader does.
    """
    reader = HuggingFaceReader(directory)
    whole = {name: reader.read_range(name, 0, math.prod(shape)).view(shape) for name, shape in reader.shapes.items()}
    return reader.config, whole


def _read_config(directory: Path) -> tuple[Format, dict[str, Any]]:
    path = directory / CONFIG
    if not path.is_file():
        raise HuggingFaceError(f"{directory} is no Hugging Face model directory", [f"{path} does not exist"])
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HuggingFaceError(f"{path} cannot be read", [str(error)]) from None
    if not isinstance(values, dict):
        raise HuggingFaceError(f"{path} cannot be read", ["it holds no JSON object"])
    source = next((known for known in FORMATS if known.model_type == values.get("model_type")), None)
    if source is None:
        known = " or ".join(sorted(one.model_type for one in FORMATS))
        reasons = [f"model_type is {values.get('model_type')!r}, not {known}"]
    else:
        with _values_that_fit(path):
            reasons = source.unreadable(values)
    if source is None or reasons:
        raise HuggingFaceError(f"{path} describes a model that cannot be imported", reasons)
    return source, values


@contextlib.contextmanager
def _values_that_fit(path: Path) -> Iterator[None]:
    """What a text, a list or an infinity in the place of a number comes to is told with the file that has it."""
    try:
        yield
    except HuggingFaceError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        reason = f"a value is not of the kind that is wanted ({type(error).__name__}: {error})"
        raise HuggingFaceError(f"{path} describes a model that cannot be imported", [reason]) from None


def _open_tensors(directory: Path) -> Tensors:
    """Tensor name -> tensor, of one file or of the shards of an index."""
    index = directory / INDEX
    paths = _indexed_files(directory, index) if index.is_file() else [directory / WEIGHTS]
    absent = [f"{path} does not exist" for path in paths if not path.is_file()]
    if absent:
        raise HuggingFaceError(f"{directory} has no complete safetensors weights", absent)
    return {tensor.name: tensor for path in paths for tensor in _tensors_in(path)}


def _indexed_files(directory: Path, index: Path) -> list[Path]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_file = {file: tensor for tensor, file in reversed(files.items())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"its weight_map cannot be read ({type(error).__name__}: {error})"
        raise HuggingFaceError(f"{index} is damaged", [reason]) from None

    def is_blob(path: str) -> bool:
        # huggingface_hub links snapshots, and older versions a local folder, to files in its cache.
        blobs = Path(path).parent
        return blobs.name == "blobs" and blobs.parent.name.startswith("models--")

    unsafe = [
        unsafe_file(index, f"weight_map.{by_file[file]}", file, directory, is_blob) for file in sorted(by_file, key=str)
    ]
    if any(unsafe):
        raise HuggingFaceError(f"{directory} names files that are not its own", list(filter(None, unsafe)))
    return [directory / file for file in sorted(by_file, key=str)]


def _tensors_in(path: Path) -> Iterator[StoredTensor]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise HuggingFaceError(f"{path} cannot be read (damaged or cut short)", [str(error)]) from None
    for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
        yield StoredTensor(file, name)
