"""What a model has read, in a file: long prompts are read once and continued whenever and as often as one likes.

A safetensors file. Its metadata hold `format_version`, `kind`, `model` (a fingerprint of configuration and weights),
`tokens` (how many the model has read) and `sha256` (of all tensors). Its tensors are `tokens` [N] int64, the ids;
`logits` [1, V], behind the last of them; and the states of the blocks, as `blocks.0.C`.

For a recurrent model the file has the same size however much was read; with attention it has the cache too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from conf.problems import other_format
from kernels.precision import compute_dtype
from model.generation.prefill import Prefix
from model.language_model import LanguageModel
from model.state import ModelState, map_tensors, named_tensors
from model.stored import what_is_computed
from model.weights import WeightsError, open_tensors, save_tensors

FORMAT_VERSION = 1
KIND = "what a model has read"
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class StateFileError(ValueError):
    """A file that does not hold what this model has read; the message names it."""


@torch.inference_mode()
def fingerprint(model: LanguageModel) -> str:
    """Tells models apart: SHA-256 of what the model computes and of sums over the bits of each of its parameters.

    Other weights have other sums unless somebody made them so. The same weights in another dtype count as others.
    """
    computed = what_is_computed(dataclasses.asdict(model.config))
    digest = hashlib.sha256(json.dumps(computed, sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        bits = parameter.view(_BITS[parameter.element_size()])
        total = int(bits.sum(dtype=torch.int64))
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {total}\n".encode())
    return digest.hexdigest()


@torch.inference_mode()
def save_prefix(path: str | Path, prefix: Prefix, model: LanguageModel) -> None:
    """Write what `model` has read as a file, over one that is there. Raises OSError."""
    tensors = {
        "tokens": torch.tensor(prefix.tokens, dtype=torch.int64),
        "logits": prefix.logits.cpu().contiguous(),
        # Parts of a state may share their memory.
        **{name: tensor.cpu().clone() for name, tensor in named_tensors(prefix.state)},
    }
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "kind": KIND,
        "model": fingerprint(model),
        "tokens": str(len(prefix.tokens)),
        "sha256": _sha256(tensors),
    }
    save_tensors(path, tensors, metadata)


@torch.inference_mode()
def load_prefix(path: str | Path, model: LanguageModel) -> Prefix:
    """What `model` has read, on its device.

    Raises:
        StateFileError: the file is missing, damaged, no such file, of a later format, or of another model.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    if metadata.get("kind") != KIND:
        raise StateFileError(f"{path} holds no state of a model: it was not written by xlstm-pretrain for that")
    if problem := other_format(path, metadata.get("format_version"), FORMAT_VERSION):
        raise StateFileError(problem)
    if metadata.get("sha256") != _sha256(tensors):
        raise StateFileError(f"{path} is damaged: its tensors are not those that were written")
    if metadata.get("model") != fingerprint(model):
        raise StateFileError(
            f"{path} is the state of another model, or of these weights in another dtype; name the checkpoint and the "
            "dtype that it was written with"
        )
    _check_tensors(path, tensors, metadata, model)
    tokens, logits = tuple(tensors.pop("tokens").tolist()), tensors.pop("logits")
    device = next(model.parameters()).device
    stored = iter(tensors[name].to(device) for name, _ in _described(model, len(tokens)))
    state = map_tensors(_state_behind(model, 1), lambda _: next(stored))
    return Prefix(tokens, state, logits.to(device))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise StateFileError(f"{path} does not exist")
    try:
        with open_tensors(path) as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except WeightsError as error:
        raise StateFileError(str(error)) from None


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], model: LanguageModel) -> None:
    """Whoever wrote the file need not have been this program."""
    count, n_ids = metadata.get("tokens", ""), model.config.vocab_size
    if not (count.isdecimal() and 0 < len(count) < 16 and int(count) > 0):
        raise StateFileError(f"{path}: its metadata do not tell how many tokens the model has read ({count!r})")
    wanted = dict(_described(model, int(count)))
    wanted["tokens"] = (torch.int64, (int(count),))
    wanted["logits"] = (compute_dtype(next(model.parameters())), (1, n_ids))
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if wrong := sorted(name for name in {**wanted, **found} if wanted.get(name) != found.get(name)):
        raise StateFileError(f"{path}: {wrong[0]} is not what this model has behind {count} tokens")
    tokens = tensors["tokens"]
    if not 0 <= tokens.min() <= tokens.max() < n_ids:
        raise StateFileError(f"{path}: its tokens are not among the model's ids 0 to {n_ids - 1}")


def _described(model: LanguageModel, count: int) -> list[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Name, dtype and shape of every tensor of the state behind `count` tokens, in the order of the state.

    What grows with the tokens grows evenly: by the difference between one token and two.
    """
    one, two = (named_tensors(_state_behind(model, tokens)) for tokens in (1, 2))
    return [
        (name, (first.dtype, tuple(a + (count - 1) * (b - a) for a, b in zip(first.shape, second.shape, strict=True))))
        for (name, first), (_, second) in zip(one, two, strict=True)
    ]


def _state_behind(model: LanguageModel, count: int) -> ModelState:
    return model.advance(torch.zeros(1, count, dtype=torch.int64, device=next(model.parameters()).device))
