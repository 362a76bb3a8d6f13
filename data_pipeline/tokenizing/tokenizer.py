"""Text to token ids and back: SentencePiece models and Hugging Face `tokenizer.json` files behind one interface.

A special token spelled in a text is encoded as text: no document can contain the end-of-document id. Encoding adds
neither a beginning- nor an end-of-document id; the shard writer appends the latter.
"""

from __future__ import annotations

import abc
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import sentencepiece

from conf.problems import other_format
from data_pipeline.errors import TokenizerError
from data_pipeline.tokenizing.config import TokenizerConfig, smallest_vocabulary

EOD_CANDIDATES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>")
# Beside a tokenizer.json whose end-of-document token is not evident from the file alone.
SIDECAR = "end_of_document.json"
SIDECAR_FORMAT = 1
# SentencePiece writes a space as this character, so the character itself has no piece of its own.
META_SPACE = "\u2581"
META_SPACE_BYTES = ("<0xE2>", "<0x96>", "<0x81>")
# Text that libraries and versions disagree on most; its ids are recorded in the manifest.
PROBE = (
    "The quick brown fox\n\tdef f(x):\r\n        return x  # 1234567890\n\n\n"
    "</s><s><unk><|endoftext|> e\u0301 \u00e9 \u4e2d\u6587 \u0627\u0644 \ufeff \u2581 "
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \x00 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa    "
)


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 when every id below `vocab_size` fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


class Tokenizer(abc.ABC):
    """A tokenizer read from a file. `path`: that file. `eod_id`: the id that ends a document.

    `special_ids`: ids of control tokens, and the one for what has no piece. `added_tokens`: spellings of these and of
    what else the file adds to its model. `control_tokens`: spelling -> id of those that no text becomes.
    `rewritten_text`: text that `encode` treats on its own; empty: none.
    `unknown_id`: the id of what has no piece; None: all has pieces, or what has none vanishes (`drops_characters`).
    `unknown_words`: an unknown token may stand for a word of characters that have pieces.
    `notes`: what was changed of what the file says, one line each.
    """

    kind: str
    library: str
    canonical_name: str
    path: Path
    vocab_size: int
    eod_id: int
    eod_token: str
    special_ids: list[int]
    added_tokens: list[str]
    control_tokens: dict[str, int]
    rewritten_text: str = ""
    unknown_id: int | None = None
    drops_characters = False
    unknown_words = False
    notes: Sequence[str] = ()

    @staticmethod
    def load(path: str | Path, eod_token: str | None = None) -> Tokenizer:
        """Read a SentencePiece `.model`, a Hugging Face `tokenizer.json`, or a folder that holds one of them.

        `eod_token` names the end-of-document token where the file leaves it open. Raises TokenizerError.
        """
        path = Path(path)
        if path.is_dir():
            path = _file_in(path)
        if not path.is_file():
            raise TokenizerError(f"{path}: no such tokenizer file; give a .model or tokenizer.json (tokenizer.path)")
        sidecar = path.parent / SIDECAR
        if eod_token is None and sidecar.is_file():
            eod_token = _eod_token_of(sidecar)
        kind = HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer
        try:
            tokenizer = kind(path, eod_token)
            # What a damaged file leaves undone shows at the first text.
            tokenizer._encode_plainly(PROBE)
        except (TokenizerError, MemoryError):
            raise
        except Exception as error:
            raise TokenizerError(f"{path}: cannot be used as a tokenizer ({error or type(error).__name__})") from None
        return tokenizer

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin or end of document."""

    def _encode_plainly(self, text: str) -> list[int]:
        """`encode` as the library does it, whatever the text spells."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as an int64 array."""
        return [np.asarray(self.encode(text), dtype=np.int64) for text in texts]

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; end of document and other control ids give no text."""

    def unknown_parts(self, text: str) -> list[str]:
        """The parts of `text` that become unknown tokens, where these may be words (`unknown_words`)."""
        return []

    @abc.abstractmethod
    def loses(self, character: str) -> bool:
        """Whether a character becomes an unknown token, or leaves nothing behind, or not all of its bytes."""

    @property
    def file_sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Identity of what ids mean: sha256 over the file's content, the end-of-document id and the specials policy."""
        identity = ["xlstm-pretrain tokenizer", 1, self.kind, self.file_sha256, self.eod_id, "specials as text"]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @property
    def probe_sha256(self) -> str:
        """sha256 of the ids of a fixed text: differs when another library version encodes differently."""
        return hashlib.sha256(json.dumps([int(i) for i in self._encode_plainly(PROBE)]).encode()).hexdigest()

    def gives_same_ids(self, other: Tokenizer) -> bool:
        """Whether ids of both mean the same text: one file, or two of which the same text gives the same ids."""
        return self.fingerprint == other.fingerprint or (
            (self.vocab_size, self.eod_id, self.probe_sha256) == (other.vocab_size, other.eod_id, other.probe_sha256)
        )

    @property
    def library_version(self) -> str:
        return version(self.library)

    def save_to(self, folder: str | Path) -> Path:
        """Copy the tokenizer's file, and what `load` needs beside it, into `folder`; returns the copy's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / self.canonical_name
        if target.resolve() != self.path.resolve():
            target.write_bytes(self.path.read_bytes())
        (folder / SIDECAR).write_text(
            json.dumps({"format_version": SIDECAR_FORMAT, "eod_token": self.eod_token}) + "\n", "utf-8"
        )
        return target


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` (kind=file) names. Raises TokenizerError."""
    if config.path is None:
        raise TokenizerError("tokenizer.path: kind=file needs a path; set tokenizer.path=FILE")
    return Tokenizer.load(config.path, config.eod_token)


def _eod_token_of(sidecar: Path) -> str:
    try:
        document = json.loads(sidecar.read_bytes())
    except (OSError, ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and (
        problem := other_format(sidecar, document.get("format_version", SIDECAR_FORMAT), SIDECAR_FORMAT)
    ):
        raise TokenizerError(problem)
    if not isinstance(document, dict) or not isinstance(document.get("eod_token"), str):
        raise TokenizerError(
            f"{sidecar}: damaged, names no eod_token; delete it and set tokenizer.eod_token, or restore it"
        )
    return document["eod_token"]


def _file_in(folder: Path) -> Path:
    for name in (SentencePieceTokenizer.canonical_name, HuggingFaceTokenizer.canonical_name):
        if (folder / name).is_file():
            return folder / name
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return models[0]
    raise TokenizerError(f"{folder}: holds no tokenizer.model or tokenizer.json; name the file (tokenizer.path)")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Control pieces are never parsed from text."""

    kind = "sentencepiece"
    library = "sentencepiece"
    canonical_name = "tokenizer.model"

    def __init__(self, path: Path, eod_token: str | None = None):
        self.path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except Exception as error:
            raise TokenizerError(f"{path}: not a SentencePiece model ({error})") from None
        self.vocab_size = self._model.vocab_size()
        if eod_token is None:
            self.eod_id = self._model.eos_id()
        else:
            self.eod_id = self._model.piece_to_id(eod_token)
        if self.eod_id < 0 or eod_token is not None and self._model.id_to_piece(self.eod_id) != eod_token:
            raise TokenizerError(f"{path}: has no end-of-document piece {eod_token or '</s>'}; set tokenizer.eod_token")
        if not self._model.is_control(self.eod_id):
            raise TokenizerError(
                f"{path}: {self._model.id_to_piece(self.eod_id)!r} is an ordinary piece that text can spell; "
                "set tokenizer.eod_token to a control piece"
            )
        self.eod_token = self._model.id_to_piece(self.eod_id)
        ids = range(self.vocab_size)
        self.special_ids = [i for i in ids if self._model.is_control(i) or self._model.is_unknown(i)]
        self.added_tokens = [self._model.id_to_piece(i) for i in self.special_ids]
        self.control_tokens = {self._model.id_to_piece(i): i for i in ids if self._model.is_control(i)}
        if sum(map(self._model.is_byte, ids)) < 256:
            self.unknown_id = self._model.unk_id()
        self._meta_space_ids = self._find_meta_space_ids()
        if self._meta_space_ids:
            self.rewritten_text = META_SPACE

    def _find_meta_space_ids(self) -> list[int]:
        """Byte pieces that spell META_SPACE; empty when the model cannot keep it apart from a space."""
        ids = [self._model.piece_to_id(piece) for piece in META_SPACE_BYTES]
        adds_prefix = self._model.encode("a", out_type=str)[0].startswith(META_SPACE)
        keeps_spaces = self._model.decode(self._model.encode("  a  ")) == "  a  "
        usable = all(self._model.is_byte(i) for i in ids) and keeps_spaces and not adds_prefix
        return ids if usable else []

    def encode(self, text: str) -> list[int]:
        if self._meta_space_ids and META_SPACE in text:
            first, *rest = text.split(META_SPACE)
            ids = self._model.encode(first)
            for part in rest:
                ids += [*self._meta_space_ids, *self._model.encode(part)]
            return ids
        return self._model.encode(text)

    def loses(self, character: str) -> bool:
        return self.unknown_id in self._model.encode(character)

    def decode(self, ids: Sequence[int]) -> str:
        ids = [int(i) for i in ids]
        _check_ids(ids, self.vocab_size)
        return self._model.decode(ids)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the Hugging Face tokenizers library."""

    kind = "huggingface"
    library = "tokenizers"
    canonical_name = "tokenizer.json"

    def __init__(self, path: Path, eod_token: str | None = None):
        import tokenizers

        self.path = path
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise TokenizerError(f"{path}: not a Hugging Face tokenizer.json ({error})") from None
        self._model.no_truncation()
        self._model.no_padding()
        # Special tokens spelled in a text are split like any text.
        self._model.encode_special_tokens = True
        if getattr(self._model.model, "dropout", None):
            self.notes = [f"BPE dropout {self._model.model.dropout:g} of {path} is switched off: ids must repeat"]
            self._model.model.dropout = None
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_token = self._find_eod(eod_token, vocabulary)
        self.eod_id = vocabulary[self.eod_token]
        added = self._model.get_added_tokens_decoder()
        self.special_ids = sorted(i for i, token in added.items() if token.special)
        self.added_tokens = [token.content for token in added.values()]
        self.control_tokens = {token.content: i for i, token in added.items() if token.special}
        self._find_unknown()
        if len(self.eod_token) == 1 and self.eod_id in self._encode_plainly(self.eod_token):
            raise TokenizerError(
                f"{path}: {self.eod_token!r} is an ordinary character; set tokenizer.eod_token to a special token"
            )

    def _find_eod(self, wanted: str | None, vocabulary: dict[str, int]) -> str:
        """The end-of-document token, made a special one in memory where the file does not mark it. TokenizerError."""
        special = sorted(t.content for t in self._model.get_added_tokens_decoder().values() if t.special)
        candidates = [token for token in EOD_CANDIDATES if token in special]
        if wanted is None and len(candidates) == 1:
            return candidates[0]
        if wanted is not None and wanted in vocabulary:
            if wanted not in special:
                self._model.add_special_tokens([wanted])
            return wanted
        what = f"has no token {wanted!r}" if wanted is not None else "cannot tell its end-of-document token"
        unmarked = [token for token in EOD_CANDIDATES if token in vocabulary and token not in special]
        if special:
            advice = (
                f"(candidates {candidates}, its special tokens are {special[:20]}); set tokenizer.eod_token to one of "
                "them"
            )
        elif unmarked:
            advice = f"(none is marked special); set tokenizer.eod_token to one that it has: {', '.join(unmarked)}"
        else:
            advice = (
                "(none is marked special); set tokenizer.eod_token to a token of its vocabulary that ends documents, "
                "or add one to the file (`add_special_tokens` of the library tokenizers)"
            )
        raise TokenizerError(f"{self.path}: {what} {advice}")

    def _find_unknown(self) -> None:
        """Set what becomes of characters without a piece. Raises TokenizerError where encoding would fail on them."""
        from tokenizers.pre_tokenizers import ByteLevel

        model = json.loads(self._model.to_str())
        kind, vocabulary = model["model"]["type"], self._model.get_vocab(with_added_tokens=True)
        if kind == "Unigram":
            unknown_id = model["model"]["unk_id"]
            name = "unk_id"
        else:
            name = repr(model["model"].get("unk_token"))
            unknown_id = vocabulary.get(model["model"].get("unk_token"))
        stages = json.dumps([model["normalizer"], model["pre_tokenizer"]])
        byte_pieces = (
            all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
            if model["model"].get("byte_fallback")
            else '"ByteLevel"' in stages and vocabulary.keys() >= set(ByteLevel.alphabet())
        )
        if byte_pieces and kind in ("BPE", "Unigram"):
            return
        if unknown_id is None and (kind != "BPE" or model["model"]["unk_token"] is not None):
            raise TokenizerError(
                f"{self.path}: its unknown token ({name}) is not in its vocabulary, so encoding fails at the first "
                f"text with something new; add it to the file (unk_token of the {kind} model), or use a tokenizer "
                "with bytes"
            )
        self.unknown_id, self.drops_characters = unknown_id, unknown_id is None
        self.unknown_words = kind in ("WordLevel", "WordPiece")

    def encode(self, text: str) -> list[int]:
        encoding = self._model.encode(text, add_special_tokens=False)
        if self.eod_id not in encoding.ids:
            return encoding.ids
        # The vocabulary itself has the token, as those of Unigram and WordLevel models: its spelling is cut in two.
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [0, *((start + end + 1) // 2 for token, (start, end) in pairs if token == self.eod_id), len(text)]
        return [token for begin, end in pairwise(cuts) for token in self._encode_plainly(text[begin:end])]

    def _encode_plainly(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        parts = [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]
        return [
            np.asarray(self.encode(text), dtype=np.int64) if (part == self.eod_id).any() else part
            for text, part in zip(texts, parts, strict=True)
        ]

    def unknown_parts(self, text: str) -> list[str]:
        encoding = self._model.encode(text, add_special_tokens=False)
        # Several unknown tokens may stand for the bytes of one character.
        spans = {span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == self.unknown_id}
        return [text[start:end] for start, end in spans]

    def loses(self, character: str) -> bool:
        encoding = self._model.encode(character, add_special_tokens=False)
        if self.unknown_id is not None:
            return self.unknown_id in encoding.ids
        model, normalizer, pre_tokenizer = self._model.model, self._model.normalizer, self._model.pre_tokenizer
        text = normalizer.normalize_str(character) if normalizer else character
        pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else [text]
        prefix, suffix = model.continuing_subword_prefix or "", model.end_of_word_suffix or ""
        kept = sum(len(token.removeprefix(prefix).removesuffix(suffix)) for token in encoding.tokens)
        return kept < sum(map(len, pieces))

    def decode(self, ids: Sequence[int]) -> str:
        ids = [int(i) for i in ids]
        _check_ids(ids, self.vocab_size)
        return self._model.decode(ids, skip_special_tokens=True)


def _check_ids(ids: list[int], vocab_size: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"decode: ids must be in 0..{vocab_size - 1}, got {min(ids)}..{max(ids)}")


def train_sentencepiece(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """Train a SentencePiece model on `texts` and return its file's content; the same texts give the same bytes.

    Text is kept exactly: no normalisation, every space and line break encoded, bytes for characters without a piece.
    Raises TokenizerError.
    """
    model = io.BytesIO()
    pieces = (piece for text in texts for piece in _pieces(text))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=pieces,
            model_writer=model,
            vocab_size=config.vocab_size,
            model_type=config.model_type,
            character_coverage=config.character_coverage,
            byte_fallback=config.byte_fallback,
            split_digits=config.split_digits,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 24,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(_why_training_failed(str(error), config)) from None
    return model.getvalue()


def _why_training_failed(message: str, config: TokenizerConfig) -> str:
    settings = f"tokenizer.vocab_size={config.vocab_size} and tokenizer.model_type={config.model_type}"
    more_text = "give more text (tokenizer.sample_bytes bounds what is used of it)"
    if found := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
        largest = int(found[1])
        fits = largest >= smallest_vocabulary(config)
        advice = f"set tokenizer.vocab_size={largest}, or {more_text}" if fits else more_text
        return f"the training text gives at most {largest} pieces with {settings}; {advice}"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"the characters of the training text need {found[1]} pieces with {settings} and "
            f"tokenizer.character_coverage={config.character_coverage}; set tokenizer.vocab_size={found[1]} or more, "
            "or lower tokenizer.character_coverage"
        )
    return f"training the SentencePiece model failed with {settings}: {message.strip()}"


def _pieces(text: str, target: int = 2000) -> Iterator[str]:
    """`text` in parts of about `target` characters, cut after line ends: the longest part bounds the memory."""
    part: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), 1 << 18):
            part.append(line[start : start + (1 << 18)])
            length += len(part[-1])
            if length >= target:
                yield "".join(part)
                part, length = [], 0
    if part:
        yield "".join(part)
