"""How much text a tokenizer loses: characters that become an unknown token, or no token at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.tokenizing.tokenizer import Tokenizer

# What of a text may be the same to a tokenizer: (name, two texts that differ in nothing else).
DISTINCTIONS = (
    ("capital letters", "A", "a"),
    ("accents", "\u00e9", "e"),
    ("compatibility characters", "\ufb01", "fi"),
    ("line ends", "a\na", "a a"),
    ("runs of spaces", "a  a", "a a"),
)


class LostText:
    """Counts what is lost of batches of texts, at the cost of a look at their ids.

    Where characters may vanish without an id, a look at every distinct character is added.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._kept: set[str] = set()
        self._dropped: set[str] = set()

    def of_batch(self, texts: Sequence[bytes], ids: np.ndarray, offsets: np.ndarray) -> dict[int, int]:
        """Number of a text -> UTF-8 bytes lost of it, for the texts that lose any; white space does not count.

        ids [N] and offsets [n + 1]: what an encoder made of `texts`.
        """
        tokenizer = self._tokenizer
        suspects: set[int] = set()
        if tokenizer.unknown_id is not None:
            places = np.flatnonzero(ids == tokenizer.unknown_id)
            suspects.update((np.searchsorted(offsets, places, side="right") - 1).tolist())
        if tokenizer.drops_characters:
            suspects.update(self._with_dropped(texts))
        lost = {number: self._lost_bytes(texts[number].decode()) for number in sorted(suspects)}
        return {number: count for number, count in lost.items() if count}

    def _with_dropped(self, texts: Sequence[bytes]) -> list[int]:
        found = []
        for number, text in enumerate(texts):
            characters = set(text.decode())
            for character in characters - self._kept - self._dropped:
                (self._dropped if self._tokenizer.drops(character) else self._kept).add(character)
            if not characters.isdisjoint(self._dropped):
                found.append(number)
        return found

    def _lost_bytes(self, text: str) -> int:
        lost = sum(len("".join(part.split()).encode()) for part in self._tokenizer.unknown_parts(text))
        return lost + sum(text.count(character) * len(character.encode()) for character in self._dropped & set(text))


def describe_losses(tokenizer: Tokenizer) -> list[str]:
    """What `tokenizer` does not keep of a text by its design, one line each."""
    lines = []
    if tokenizer.drops_characters:
        lines.append(
            "the tokenizer has neither an unknown token nor all bytes: characters that are not in its vocabulary "
            "vanish; they are counted"
        )
    elif tokenizer.unknown_id is not None:
        lines.append("the tokenizer makes an unknown token of what is not in its vocabulary; that is counted")
    same = [name for name, one, other in DISTINCTIONS if _encoded_alike(tokenizer, one, other)]
    if same:
        lines.append(f"the tokenizer does not keep {', '.join(same)}: it was made so, and this is not counted as lost")
    return lines


def _encoded_alike(tokenizer: Tokenizer, one: str, other: str) -> bool:
    ids = tokenizer.encode(one)
    unknown = tokenizer.unknown_id in ids or tokenizer.drops_characters and any(map(tokenizer.drops, one + other))
    return bool(ids) and not unknown and ids == tokenizer.encode(other)
