"""Model weights on disk: a directory with `model.json` and any number of `weights-*.safetensors` files.

A file holds flat fragments of parameters, so that every rank of a sharded run writes what it owns and nothing is ever
gathered: the key `<parameter name>@<offset>` is a 1-D tensor that covers elements offset ... offset + length - 1 of
the flattened parameter. A whole parameter is one fragment at offset 0. Each file's metadata holds `format_version` and
`shapes`, a JSON object from parameter name to shape that names every parameter of the model, also those of which the
file holds nothing: a file that is lost is then noticed by what it leaves uncovered.

A directory of whole weights (`save_whole`) has `model.safetensors`, or several files and their index, in the place of
these: each parameter under its own name and in its own shape, as other programs want it, with the same metadata.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import stat
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from conf.problems import is_later_format, other_format
from conf.stored_values import fits, shortened
from model.config import ModelConfig, validate_model
from model.marker import COMPLETE, MarkerError, read_marker
from model.stored import with_current_keys
from model.whole_tensors import SHARD_BYTES, write_whole_tensors

FORMAT_VERSION = 1
MODEL_JSON = "model.json"
_OPEN_FILES = 64
# Of the parts of parameters, as safetensors calls them.
_DTYPES = ("F64", "F32", "F16", "BF16")


class WeightsError(ValueError):
    """A weights directory that cannot be read as what it should be; the message names the file or the parameter."""


class LaterWeightsError(WeightsError):
    """Weights that a later version of this program wrote."""


def write_model_json(directory: str | Path, config: ModelConfig) -> Path:
    """Write `config` as `directory`/model.json (the directory is made where missing); returns the file's path."""
    path = Path(directory) / MODEL_JSON
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"format_version": FORMAT_VERSION, "model": dataclasses.asdict(config)}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def read_model_json(directory: str | Path) -> ModelConfig:
    """The configuration in `directory`/model.json. Raises WeightsError when it is missing, damaged or not ours."""
    path = Path(directory) / MODEL_JSON
    if not path.is_file():
        raise WeightsError(
            f"{path} does not exist: a weights directory holds {MODEL_JSON} beside its weights-*.safetensors files"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from None
    if isinstance(document, dict) and "format_version" in document:
        _check_version(path, document["format_version"])
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise WeightsError(f"{path} has no section 'model': it was not written by xlstm-pretrain")
    _check_version(path, document.get("format_version"))
    return build_model_config(document["model"], path)


def build_model_config(stored: Mapping[str, Any], path: Path) -> ModelConfig:
    """The configuration in `stored`, the section "model" of the file `path`, of any version.

    Imports the modules of its plugins. Raises WeightsError when it is damaged, or describes a model that does not work.
    """
    config: ModelConfig = _build(ModelConfig, with_current_keys(stored), path, "model")
    if problems := validate_model(config):
        raise WeightsError(f"{path} describes a model that does not work: {'; '.join(problems)}")
    return config


def save_fragments(
    path: str | Path,
    fragments: Iterable[tuple[str, int, torch.Tensor]],
    shapes: Mapping[str, Sequence[int]],
) -> None:
    """Write one weights file.

    Args:
        path: the file, named weights-*.safetensors in a directory that `write_model_json` made or will make.
        fragments: (parameter name, offset, tensor) triples; the tensor is 1-D, fp32 or bf16, on any device, and covers
            the elements from `offset` on of the flattened parameter. Fragments without elements are left out.
        shapes: shape of every parameter of the model, also of those that this file holds nothing of.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, offset, tensor in fragments:
        assert name in shapes, f"{name} is missing from shapes"
        assert tensor.dim() == 1, f"{name}: a fragment is flat, not {tuple(tensor.shape)}"
        if tensor.numel():
            tensors[f"{name}@{offset}"] = tensor.detach().cpu().contiguous()
    save_tensors(path, tensors, _metadata(shapes))


def _metadata(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    return {
        "format_version": str(FORMAT_VERSION),
        "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
    }


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file with the access rights that any new file gets here.

    safetensors writes a temporary file that only its owner may read, and renames it.
    """
    path = Path(path)
    # The umask of a process can be read only by changing it, for all threads; a plain file tells what follows from it.
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata=metadata)
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def save_model(model: nn.Module, config: ModelConfig, directory: str | Path) -> None:
    """Write all of `model` as one weights file with its model.json; tied parameters are written once."""
    save_state_dict(dict(model.named_parameters()), config, directory)


def save_state_dict(state_dict: Mapping[str, torch.Tensor], config: ModelConfig, directory: str | Path) -> None:
    """Write whole parameters {name: tensor} as one weights file with its model.json."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    fragments = ((name, 0, tensor.detach().reshape(-1)) for name, tensor in state_dict.items())
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    save_fragments(Path(directory) / "weights-00000.safetensors", fragments, shapes)
    write_model_json(directory, config)


def save_whole(
    directory: Path,
    config: ModelConfig,
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    max_bytes: int | None = SHARD_BYTES,
) -> list[Path]:
    """Write whole parameters with their model.json, one in memory at a time; returns the files that hold them.

    Arguments as in `write_whole_tensors`.
    """
    write_model_json(directory, config)
    return write_whole_tensors(directory, shapes, read, dtype, {"format": "pt", **_metadata(shapes)}, max_bytes)


def load_weights(directory: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter in `directory`, whole, on the CPU, in the dtype on disk, one at a time.

    That the fragments cover every parameter exactly once is checked before the first one is read.
    Raises WeightsError naming the file that cannot be read, or the parameter and the elements that are missing or that
    two files claim.
    """
    index = WeightsReader(Path(directory))
    index.check_coverage()
    return index.read()


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Elements offset ... offset + length - 1 of a flattened parameter: a tensor of `shape` under `key` in a file."""

    offset: int
    length: int
    path: Path
    key: str
    shape: tuple[int, ...]


class WeightsReader:
    """Random access to a weights directory; `shapes` maps every parameter to its shape.

    Of a checkpoint's it takes the files that the marker lists, and no others. Raises WeightsError, naming the file,
    when one cannot be read.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[str, list[_Piece]] = {}
        # Of what is stored, as safetensors calls them.
        self.dtypes: set[str] = set()
        self._opened = functools.lru_cache(maxsize=_OPEN_FILES)(open_tensors)
        paths = _weights_files(directory)
        if not paths:
            raise WeightsError(f"{directory} holds no weights-*.safetensors file")
        for path in paths:
            self._add(path)

    def _add(self, path: Path) -> None:
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
            _check_version(path, metadata.get("format_version"))
            shapes = _read_shapes(path, metadata.get("shapes"))
            for name, shape in shapes.items():
                known = self.shapes.setdefault(name, shape)
                if known != shape:
                    raise WeightsError(f"{path}: {name} has shape {list(shape)}, in another file {list(known)}")
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = file.get_slice(key)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                # A whole parameter, or a flat part of one.
                name, _, offset = (key, "", "0") if key in shapes else key.rpartition("@")
                # Python has no words for longer numbers.
                if name not in shapes or not (offset.isdecimal() and len(offset) < 20):
                    raise WeightsError(f"{path}: unexpected tensor {key!r}")
                fits_parameter = shape == shapes[name] if name == key else len(shape) == 1
                if dtype not in _DTYPES or not fits_parameter:
                    wanted = f"parameter of shape {list(shapes[name])}" if name == key else "flat part of a parameter"
                    raise WeightsError(f"{path}: {key} is of type {dtype} and shape {list(shape)}, no {wanted}")
                self.dtypes.add(dtype)
                piece = _Piece(int(offset), math.prod(shape), path, key, shape)
                self.pieces.setdefault(name, []).append(piece)

    def check_coverage(self) -> None:
        """Raises WeightsError unless the fragments cover every parameter exactly once."""
        for name, shape in self.shapes.items():
            position = 0
            for piece in sorted(self.pieces.get(name, []), key=lambda piece: piece.offset):
                if piece.offset > position:
                    raise WeightsError(self._missing(name, position, piece.offset))
                if piece.offset < position:
                    raise WeightsError(
                        f"{self.directory}: {name} elements {piece.offset} to "
                        f"{min(position, piece.offset + piece.length) - 1} are in more than one file (again in "
                        f"{piece.path.name}): the directory mixes files of different saves"
                    )
                position += piece.length
            numel = torch.Size(shape).numel()
            if position < numel:
                raise WeightsError(self._missing(name, position, numel))
            if position > numel:
                raise WeightsError(f"{self.directory}: {name} has {numel} elements but fragments reach {position}")

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor) of every parameter, one at a time."""
        for name, shape in self.shapes.items():
            yield name, self.read_range(name, 0, torch.Size(shape).numel()).view(shape)

    def read_range(self, name: str, offset: int, numel: int) -> torch.Tensor:
        """Elements [offset, offset + numel) of the flattened parameter `name`, on the CPU, in the dtype on disk."""
        parts = []
        for piece in sorted(self.pieces.get(name, []), key=lambda piece: piece.offset):
            start, end = max(offset - piece.offset, 0), min(offset + numel - piece.offset, piece.length)
            if start < end:
                parts.append(self._read_piece(piece, start, end))
        if len({part.dtype for part in parts}) > 1:
            raise WeightsError(f"{self.directory}: the fragments of {name} have different dtypes")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_piece(self, piece: _Piece, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of the flattened tensor; no more is read than the rows that they are in."""
        file = self._opened(piece.path)
        if not piece.shape:
            # A single number has no rows.
            number: torch.Tensor = file.get_tensor(piece.key)
            return number.reshape(-1)
        stored = file.get_slice(piece.key)
        elements = math.prod(piece.shape[1:])
        first = start // elements
        rows: torch.Tensor = stored[first : -(-end // elements)]
        return rows.reshape(-1)[start - first * elements : end - first * elements]

    def _missing(self, name: str, start: int, end: int) -> str:
        return (
            f"{self.directory}: {name} elements {start} to {end - 1} are missing: a *.safetensors file was lost or "
            "never written"
        )


def _weights_files(directory: Path) -> list[Path]:
    """Of a checkpoint's, those that its marker lists: any other is a stray. Else what is there."""
    checkpoint = directory.absolute().parent
    if (checkpoint / COMPLETE).exists():
        try:
            listed = read_marker(checkpoint).files_in(directory.absolute().name)
        except MarkerError as error:
            raise WeightsError(str(error)) from None
        if listed:
            return [path for name in listed if (path := directory / Path(name).name).match("weights-*.safetensors")]
    return sorted(directory.glob("weights-*.safetensors")) or sorted(directory.glob("model*.safetensors"))


def open_tensors(path: Path) -> Any:
    """A safetensors file, to read from. Raises WeightsError: it cannot be read as one."""
    if path.exists() and not path.is_file():
        # To open a pipe would wait for ever.
        raise WeightsError(f"{path} cannot be read: it is no regular file")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read (damaged or cut short): {error}") from None


def _read_shapes(path: Path, text: str | None) -> dict[str, tuple[int, ...]]:
    try:
        shapes = json.loads(text or "")
    except (ValueError, RecursionError):
        shapes = None
    if not isinstance(shapes, dict) or not all(fits(shape, list[int]) for shape in shapes.values()):
        raise WeightsError(f"{path}: its metadata do not give the shape of each parameter")
    if wrong := sorted(name for name, shape in shapes.items() if not all(0 <= size < 2**63 for size in shape)):
        raise WeightsError(f"{path}: {wrong[0]} cannot have shape {shapes[wrong[0]]}")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _check_version(path: Path, version: object) -> None:
    if problem := other_format(path, version, FORMAT_VERSION):
        raise (LaterWeightsError if is_later_format(version, FORMAT_VERSION) else WeightsError)(problem)


def _build(schema: type[Any], values: dict[str, Any], path: Path, prefix: str) -> Any:
    hints = typing.get_type_hints(schema)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise WeightsError(f"{path}: unknown keys {', '.join(f'{prefix}.{key}' for key in unknown)}")
    arguments = {}
    for key, value in values.items():
        nested: list[Any] = [kind for kind in typing.get_args(hints[key]) if dataclasses.is_dataclass(kind)]
        if nested and isinstance(value, dict):
            arguments[key] = _build(nested[0], value, path, f"{prefix}.{key}")
        elif fits(value, hints[key]):
            arguments[key] = value
        else:
            raise WeightsError(f"{path}: {prefix}.{key} cannot be {shortened(value)}")
    return schema(**arguments)
