"""How much text a tokenizer loses: characters that become an unknown token, or no token at all."""

from __future__ import annotations

import sys
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


# Of `_weights`: a character that was not looked at yet; no character has so many bytes.
UNSEEN = 255


class LostText:
    """Counts what is lost of batches of texts, at the cost of a look at their ids.

    Where characters may vanish without an id, a look at every character is added.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # UTF-8 bytes lost with a character, by its code point. Made when it is needed: 1.1 MB.
        self._weights = np.empty(0, dtype=np.uint8)

    def of_batch(self, texts: Sequence[bytes], ids: np.ndarray, offsets: np.ndarray) -> dict[int, int]:
        """Number of a text -> UTF-8 bytes lost of it, for the texts that lose any; white space does not count.

        ids [N] and offsets [n + 1]: what an encoder made of `texts`.
        """
        tokenizer = self._tokenizer
        suspects: Sequence[int] = ()
        if tokenizer.drops_characters:
            suspects = range(len(texts))
        elif tokenizer.unknown_id is not None:
            places = np.flatnonzero(ids == tokenizer.unknown_id)
            suspects = np.unique(np.searchsorted(offsets, places, side="right") - 1).tolist()
        if not suspects:
            return {}
        suspected = [texts[number] for number in suspects]
        count = self._in_words if tokenizer.unknown_words else self._in_characters
        return {number: lost for number, lost in zip(suspects, count(suspected), strict=True) if lost}

    def _in_words(self, texts: list[bytes]) -> list[int]:
        parts = (self._tokenizer.unknown_parts(text.decode()) for text in texts)
        return [sum(len("".join(part.split()).encode()) for part in of_text) for of_text in parts]

    def _in_characters(self, texts: list[bytes]) -> list[int]:
        if not len(self._weights):
            self._weights = np.full(sys.maxunicode + 1, UNSEEN, dtype=np.uint8)
        points = np.frombuffer(b"".join(texts).decode().encode("utf-32-le"), dtype="<u4")
        weights = self._weights[points]
        for point in np.unique(points[weights == UNSEEN]).tolist():
            character = chr(point)
            lost = not character.isspace() and self._tokenizer.loses(character)
            self._weights[point] = len(character.encode()) if lost else 0
        weights = self._weights[points]
        if not weights.any():
            return [0] * len(texts)
        sums = np.concatenate(([0], np.cumsum(weights, dtype=np.int64)))
        ends = np.cumsum([len(text.decode()) for text in texts])
        return np.diff(sums[ends], prepend=0).tolist()


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
    unknown = tokenizer.unknown_id in ids or tokenizer.drops_characters and any(map(tokenizer.loses, one + other))
    return bool(ids) and not unknown and ids == tokenizer.encode(other)
