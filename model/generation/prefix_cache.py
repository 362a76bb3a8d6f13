"""States of prompts' beginnings, kept so that prompts that begin alike need not be read again.

A state is kept under all the tokens before it, and where a piece of the reading ended: whoever continues it computes
exactly what it would have computed without.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from model.state import ModelState, named_tensors


@dataclass(frozen=True)
class _Kept:
    state: ModelState
    nbytes: int


class PrefixCache:
    """At most `capacity` bytes of states, on their device; where one must go, the one that was of use longest ago goes.

    Attributes:
        nbytes: of the states that are kept now.
        lookups: how often a prompt was looked up.
        hits: how often some beginning of it was kept.
        tokens_saved: tokens that were not read for that.
    """

    def __init__(self, capacity: int):
        """`capacity`: in bytes; 0 keeps nothing."""
        self.capacity = capacity
        self.nbytes = self.lookups = self.hits = self.tokens_saved = 0
        # The least recently used first.
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, tokens: Sequence[int], state: ModelState) -> None:
        """Keep a copy of the state behind `tokens`, a batch of one; not if it alone is larger than all that may be."""
        nbytes = sum(tensor.nbytes for _, tensor in named_tensors(state))
        if nbytes > self.capacity:
            return
        [key] = _keys(tokens, [len(tokens)])
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        while self.nbytes + nbytes > self.capacity:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes
        # Parts of a state may be views of what is far larger.
        self._kept[key] = _Kept(state.map(lambda tensor: tensor.clone()), nbytes)
        self.nbytes += nbytes

    def longest(self, tokens: Sequence[int], lengths: Sequence[int]) -> tuple[int, ModelState | None]:
        """Of the beginnings of `tokens` with these lengths, in ascending order, the longest that is kept: its length
        and the state behind it, which nobody may change; 0 and None if none is."""
        if not self.capacity:
            return 0, None
        self.lookups += 1
        for length, key in reversed(list(zip(lengths, _keys(tokens, lengths), strict=True))):
            if key in self._kept:
                self._kept.move_to_end(key)
                self.hits += 1
                self.tokens_saved += length
                return length, self._kept[key].state
        return 0, None


def _keys(tokens: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """SHA-256 of the beginnings of `tokens` with these lengths, in ascending order; one pass over the tokens."""
    digest, done, keys = hashlib.sha256(), 0, []
    for length in lengths:
        digest.update(array("q", tokens[done:length]).tobytes())
        done = length
        keys.append(digest.copy().digest())
    return keys
