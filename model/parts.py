"""Which part of a model a stage holds, as data: a range of blocks, and perhaps one of the ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """The blocks of `blocks` by their number in the whole model; with the embedding, with the norm and the head."""

    blocks: range
    embedding: bool = False
    head: bool = False

    @classmethod
    def whole(cls, config: ModelConfig) -> Part:
        """All of the model."""
        return cls(range(config.n_blocks), embedding=True, head=True)


def split(config: ModelConfig, first_blocks: Sequence[int]) -> list[Part]:
    """The model cut before each of `first_blocks`: the first part has the embedding, the last one norm and head.

    split(config, [8, 16]) are three parts; equal neighbours leave one without blocks. Raises ValueError for cuts that
    do not ascend from 0 to n_blocks.
    """
    borders = [0, *first_blocks, config.n_blocks]
    if borders != sorted(borders):
        raise ValueError(f"cuts {list(first_blocks)} do not ascend between 0 and n_blocks = {config.n_blocks}")
    last = len(borders) - 2
    return [
        Part(range(start, end), embedding=number == 0, head=number == last)
        for number, (start, end) in enumerate(zip(borders, borders[1:], strict=False))
    ]
