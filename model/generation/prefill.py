"""Reading a prompt: in pieces as large as memory allows, with the logits of its last token alone.

Axes: B batch, P prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.hardware import CPU, Hardware
from model.language_model import LanguageModel
from model.memory import prefill_bytes_per_token
from model.state import ModelState

# Bytes of activations that a piece may have on a CPU, where larger pieces are no faster, and as a share of what is free
# on a GPU.
CPU_PIECE_BYTES = 2**25
GPU_PIECE_SHARE = 0.25
# Larger pieces are no faster anywhere; so the numbers do not depend on the memory of large GPUs either.
LARGEST_PIECE = 16384
# What is divided by chunks of a recurrence leaves none cut short.
_GRAIN = 256


@dataclass(frozen=True)
class Prefix:
    """What a model has read: a text's beginning that any number of continuations can start from.

    Attributes:
        tokens: the ids, first to last.
        state: behind the last of them, as a batch of one; nothing changes it.
        logits: [1, V] float32 (float64 for a float64 model), behind the last of them.
    """

    tokens: tuple[int, ...]
    state: ModelState
    logits: Tensor


def piece_tokens(config: ModelConfig, hardware: Hardware, context: int, bytes_of_piece: float) -> int:
    """Tokens of a piece, 256 at least, whose activations take at most `bytes_of_piece`; `context`: of whole texts."""
    fitting = int(bytes_of_piece / prefill_bytes_per_token(config, context, hardware))
    return min(LARGEST_PIECE, max(_GRAIN, fitting // _GRAIN * _GRAIN))


def tokens_at_once(model: LanguageModel, context: int) -> int:
    """Tokens, of all sequences together, that `model` reads at once where it is, of texts of `context` tokens."""
    parameter = next(model.parameters())
    on_gpu = parameter.device.type == "cuda"
    name = torch.cuda.get_device_name(parameter.device) if on_gpu else CPU
    hardware = Hardware(name, parameter.element_size())
    allowed = GPU_PIECE_SHARE * torch.cuda.mem_get_info(parameter.device)[0] if on_gpu else CPU_PIECE_BYTES
    return piece_tokens(model.config, hardware, context, allowed)


@torch.inference_mode()
def read_piece(model: LanguageModel, tokens: Sequence[int], before: ModelState | None) -> tuple[Tensor, ModelState]:
    """Logits [1, V] and state behind a piece of one text, where `before` is the state before it; None: it begins."""
    return model.predict(_on_device(model, [list(tokens)]), state=before)


@torch.inference_mode()
def read(
    model: LanguageModel, tokens: Sequence[int], *, behind: Prefix | None = None, piece: int | None = None
) -> Prefix:
    """The prefix that ends with `tokens`, one or more, behind those of another.

    `piece`: tokens that go through the model at a time; None: as many as memory allows.
    """
    assert len(tokens) > 0, "there is nothing to read"
    held = () if behind is None else behind.tokens
    piece = piece or tokens_at_once(model, len(held) + len(tokens))
    logits, state = read_batch(
        model, _on_device(model, [list(tokens)]), None, None if behind is None else behind.state, piece
    )
    return Prefix((*held, *tokens), state, logits)


@torch.inference_mode()
def read_batch(
    model: LanguageModel, tokens: Tensor, document_start: Tensor | None, state: ModelState | None, piece: int
) -> tuple[Tensor, ModelState]:
    """Logits [B, V] and state behind tokens [B, P] on the model's device, `piece` of each sequence at a time."""
    length = tokens.shape[1]
    last = (length - 1) // piece * piece
    for start in range(0, last, piece):
        part = slice(start, start + piece)
        state = model.advance(tokens[:, part], document_start=_cut(document_start, part), state=state)
    part = slice(last, length)
    return model.predict(tokens[:, part], document_start=_cut(document_start, part), state=state)


def _cut(document_start: Tensor | None, part: slice) -> Tensor | None:
    return None if document_start is None else document_start[:, part]


def _on_device(model: LanguageModel, tokens: list[list[int]]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=next(model.parameters()).device)
