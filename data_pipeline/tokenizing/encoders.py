"""Batches of texts to token ids, by the tokenizer's own library or by a faster one that gives the same ids.

A faster library (extra `fast-prepare`) is used only where its ids equal the reference's on probe texts and on documents
of the corpus, and it is compared on a small sample of every batch while it runs. Whatever it might take for a special
token is encoded by the reference, since text that spells one is text.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Container, Sequence
from importlib import import_module
from importlib.metadata import version

import numpy as np

from data_pipeline.errors import TokenizerError
from data_pipeline.tokenizing.tokenizer import META_SPACE, PROBE, Tokenizer, token_dtype

Encode = Callable[[Sequence[bytes]], tuple[np.ndarray, np.ndarray]]
# Of every batch one excerpt is encoded by both libraries: one character in SAMPLE_RATE, within these bounds.
SAMPLE_RATE = 8192
SAMPLE_CHARACTERS = (128, 512)
# Texts on which tokenizers of one file are known to differ, beside its own added tokens.
PROBES = (
    PROBE,
    "",
    " ",
    "\n",
    "  two  spaces,\ttab\t\tand\r\nline ends\n\n\n   \n",
    *(f"{' ' * n}x{' ' * n}" for n in (2, 3, 7, 8, 15, 16, 23, 24, 25, 33, 64)),
    "<s>a</s> <unk> <pad> <|endoftext|><|padding|> <0x0A> [INST] <|im_start|>",
    "\x00\x01\x1b[0m nul and control\x7f",
    "\ufeffmark at the start, \ufeff inside",
    "e\u0301 \u00e9 n\u0303 \u1e9b\u0323 \ufb01 \u2126 \uff21\uff22 \u00a0 \u2009 \u3000 \u200b \u200d",
    "\u4e2d\u6587\u6d4b\u8bd5 \u65e5\u672c\u8a9e\u3092\u66f8\u304f \ud55c\uad6d\uc5b4",
    "\u0410\u0411\u0412 \u0627\u0644\u0639 \u0939\u093f \U00020000 \ufffd",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "I'm you're IT'S we'll 12345678901234567890 3.14e-10 0x1F __init__ a_b-c/d\\e {{}} ();;;",
    f"{META_SPACE} {META_SPACE}{META_SPACE}x {META_SPACE}",
    "a" * 100_000,
    "ab " * 30_000,
    "=" * 5000 + "-" * 5000 + "\n" * 5000,
)


class EncoderMismatchError(TokenizerError):
    """A fast library gave other ids than the reference, or failed; its units are done again with the reference."""


class Encoder(abc.ABC):
    """Encodes batches of UTF-8 texts. `name`: library and version; `backend`: what `build_encoder` calls it."""

    name: str
    backend = "reference"

    @abc.abstractmethod
    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [N] of the tokenizer's token dtype, offsets int64 [n + 1]): text i is ids[offsets[i] : offsets[i + 1]].

        Without begin or end of document. Raises TokenizerError for an id outside the vocabulary, and
        EncoderMismatchError.
        """


class ReferenceEncoder(Encoder):
    """The tokenizer's own library."""

    def __init__(self, tokenizer: Tokenizer):
        self.name = f"{tokenizer.library} {tokenizer.library_version}"
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        parts = self._tokenizer.encode_batch([text.decode("utf-8") for text in texts])
        offsets = np.concatenate(([0], np.cumsum([len(part) for part in parts], dtype=np.int64)))
        ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        return _narrowed(ids, self._tokenizer.vocab_size, self.name), offsets


class FastEncoder(Encoder):
    """A faster library, with the reference for what it might read differently, and compared with it on samples."""

    def __init__(self, backend: str, encode: Encode, tokenizer: Tokenizer):
        self.backend = backend
        self.name = f"{backend} {version(DISTRIBUTIONS[backend])}"
        self._encode = encode
        self._reference = ReferenceEncoder(tokenizer)
        self._vocab_size = tokenizer.vocab_size
        self._special_ranges = _ranges(tokenizer.special_ids)
        self._rewritten = tokenizer.rewritten_text.encode()

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self.encode_unchecked(texts)
        self._compare_excerpt(texts, len(ids))
        return ids, offsets

    def encode_unchecked(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """`encode` without the sample that is compared."""
        try:
            ids, offsets = self._encode(texts)
            ids = _narrowed(ids, self._vocab_size, self.name)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        # The Rust libraries' panics are no Exception.
        except BaseException as error:
            raise EncoderMismatchError(_first_line(error)) from None
        if len(offsets) != len(texts) + 1 or offsets[-1] != len(ids):
            raise EncoderMismatchError(f"it gave ids for {len(offsets) - 1} of {len(texts)} texts")
        doubtful = self._doubtful(texts, ids, offsets)
        if not doubtful:
            return ids, offsets
        parts = np.split(ids, offsets[1:-1])
        again, again_offsets = self._reference.encode([texts[number] for number in doubtful])
        for number, part in zip(doubtful, np.split(again, again_offsets[1:-1]), strict=True):
            parts[number] = part
        return np.concatenate(parts), np.concatenate(([0], np.cumsum([len(part) for part in parts], dtype=np.int64)))

    def _doubtful(self, texts: Sequence[bytes], ids: np.ndarray, offsets: np.ndarray) -> list[int]:
        """Texts in which the library saw a special token, or that the reference rewrites before it encodes them."""
        found: set[int] = set()
        for first, last in self._special_ranges:
            # Unsigned: below `first` wraps around to large values.
            places = np.flatnonzero((ids - ids.dtype.type(first) if first else ids) <= last - first)
            found.update((np.searchsorted(offsets, places, side="right") - 1).tolist())
        if self._rewritten:
            found.update(number for number, text in enumerate(texts) if self._rewritten in text)
        return sorted(found)

    def _compare_excerpt(self, texts: Sequence[bytes], somewhere: int) -> None:
        """Compare a small part of a batch at a place that `somewhere` selects."""
        length = sum(map(len, texts)) // SAMPLE_RATE
        length = min(max(length, SAMPLE_CHARACTERS[0]), SAMPLE_CHARACTERS[1])
        text = texts[somewhere % len(texts)]
        start = somewhere * 7919 % max(1, len(text) - length)
        # A character takes up to 4 bytes; what the slice has of one that it cuts is left out.
        self.compare([text[start : start + 4 * length].decode("utf-8", "ignore")[:length].encode()])

    def compare(self, texts: Sequence[bytes]) -> None:
        """Raises EncoderMismatchError with the first of `texts` that both libraries encode differently."""
        ids, offsets = self.encode_unchecked(texts)
        expected, expected_offsets = self._reference.encode(texts)
        if np.array_equal(offsets, expected_offsets) and np.array_equal(ids, expected):
            return
        for number, text in enumerate(texts):
            mine = ids[offsets[number] : offsets[number + 1]]
            theirs = expected[expected_offsets[number] : expected_offsets[number + 1]]
            if not np.array_equal(mine, theirs):
                raise EncoderMismatchError(f"its ids differ from {self._reference.name}'s for {_shown(text)}")


def build_encoder(tokenizer: Tokenizer, backend: str) -> Encoder:
    """The encoder of one library, "reference" or a key of BACKENDS, uncompared. Raises what the library raises."""
    if backend == "reference":
        return ReferenceEncoder(tokenizer)
    return _build_fast_encoder(tokenizer, backend)


def _build_fast_encoder(tokenizer: Tokenizer, backend: str) -> FastEncoder:
    return FastEncoder(backend, BACKENDS[backend](tokenizer), tokenizer)


def choose_encoder(
    tokenizer: Tokenizer, wanted: str, sample: Callable[[], list[str]], refused: Container[str] = ()
) -> tuple[Encoder, list[str]]:
    """The encoder for `tokenizer`, and what to tell about the choice, one line each.

    `wanted`: "auto" takes the first fast library that is installed, reads the tokenizer and gives the reference's ids
    on the probes and on `sample()` (documents of the corpus); "reference" none; a library's name that one. `refused`:
    names of encoders that were found to differ. Raises TokenizerError when a library asked for by name cannot be used.
    """
    reference = ReferenceEncoder(tokenizer)
    lines = []
    names = {"auto": list(BACKENDS), "reference": []}.get(wanted, [wanted])
    for name in names:
        try:
            encoder = _build_fast_encoder(tokenizer, name)
            if encoder.name in refused:
                raise TokenizerError("it gave other ids than the reference for this corpus")
            texts = [text.encode("utf-8") for text in (*_probes(tokenizer), *sample())]
            encoder.compare(texts)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            reason = _reason(name, error)
        else:
            lines.append(
                f"encoding with {encoder.name}: its ids equal {reference.name}'s on {len(texts)} texts; a sample of "
                "every input is compared"
            )
            return encoder, lines
        if wanted == name:
            raise TokenizerError(f"tokenizer.backend={name}: {reason}; use auto or reference")
        lines.append(f"not encoding with {name}: {reason}")
    lines.append(f"encoding with {reference.name}, the reference")
    return reference, lines


def _reason(name: str, error: BaseException) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return _first_line(error)
    remedy = f"(pip install '.[fast-prepare]' or pip install {DISTRIBUTIONS[name]})"
    missing = (error.name or "").partition(".")[0]
    if missing in ("", name, DISTRIBUTIONS[name]):
        return f"not installed {remedy}"
    return f"it needs the package {missing}, which is not installed {remedy}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _probes(tokenizer: Tokenizer) -> list[str]:
    added = tokenizer.added_tokens[:300]
    return [*PROBES, *(f"a{token}b {token} {token}{token}\n{token}" for token in added), " x ".join(added)]


def _shown(text: bytes) -> str:
    return repr(text[:60].decode("utf-8", "replace")) + (f" ({len(text)} bytes)" if len(text) > 60 else "")


def _narrowed(ids: np.ndarray, vocab_size: int, name: str) -> np.ndarray:
    lowest = int(ids.min()) if ids.size and ids.dtype.kind == "i" else 0
    if ids.size and (lowest < 0 or int(ids.max()) >= vocab_size):
        raise TokenizerError(f"{name} gave an id outside the vocabulary of {vocab_size}")
    return ids.astype(token_dtype(vocab_size), copy=False)


def _ranges(ids: Sequence[int]) -> list[tuple[int, int]]:
    """`ids` as inclusive ranges."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(ids):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def _gigatoken(tokenizer: Tokenizer) -> Encode:
    import gigatoken

    # Where it is missing gigatoken gives lists in place of arrays, without a word.
    import_module("awkward")
    if tokenizer.kind == "sentencepiece":
        model = gigatoken.Tokenizer.from_sentencepiece(tokenizer.path)
    else:
        model = gigatoken.Tokenizer(str(tokenizer.path))

    def encode(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        layout = model.encode_batch(list(texts), parallel=False).layout
        return layout.content.data, np.asarray(layout.offsets, dtype=np.int64)

    return encode


def _fastokens(tokenizer: Tokenizer) -> Encode:
    from fastokens import _native

    _refuse_sentencepiece(tokenizer)
    model = _native.Tokenizer.from_file(str(tokenizer.path))
    model.no_truncation()
    return lambda texts: _from_buffers(model.encode_batch_flat([t.decode() for t in texts], False, True))


def _splintr(tokenizer: Tokenizer) -> Encode:
    import splintr

    _refuse_sentencepiece(tokenizer)
    model = splintr.from_json(str(tokenizer.path))
    return lambda texts: _from_buffers(model.encode_batch_flat([t.decode() for t in texts]))


def _refuse_sentencepiece(tokenizer: Tokenizer) -> None:
    if tokenizer.kind == "sentencepiece":
        raise TokenizerError("it does not read SentencePiece models")


def _from_buffers(buffers: tuple[bytes, bytes]) -> tuple[np.ndarray, np.ndarray]:
    ids, offsets = buffers
    return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8").astype(np.int64)


# Fastest first.
BACKENDS: dict[str, Callable[[Tokenizer], Encode]] = {
    "gigatoken": _gigatoken,
    "fastokens": _fastokens,
    "splintr": _splintr,
}
DISTRIBUTIONS = {"gigatoken": "gigatoken", "fastokens": "fastokens", "splintr": "splintr-rs"}
