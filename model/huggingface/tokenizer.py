"""Tokenizer files that transformers.AutoTokenizer loads, with the ids that the model was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

# SentencePiece writes a space within a piece as this character.
META_SPACE = "\u2581"
# Log probability of what a unigram model must not choose.
_NEVER = -1e6
_SAMPLE = (
    "The quick brown fox jumps over 13 lazy dogs; it's 3.14159, isn't it?\n\tdef f(x):\r\n    return x ** 2  # note\n\n"
    "</s><s><unk><|endoftext|> caf\u00e9 e\u0301 na\u00efve \u4e2d\u6587\u5206\u8bcd \u0627\u0644\u0639\u0631\u0628 "
    "\U0001f469\u200d\U0001f467 \u2581 \ufeff aaaaaaaaaaaaaaaaaaaa    "
)


class ExportedTokenizer(Protocol):
    """What an export needs of a tokenizer; data_pipeline.tokenizing.tokenizer.Tokenizer has it."""

    # tokenizer.json of the tokenizers library, or a SentencePiece model.
    path: Path
    vocab_size: int
    eod_id: int
    eod_token: str

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def export_tokenizer(tokenizer: ExportedTokenizer, directory: Path) -> list[str]:
    """Write the tokenizer's files into `directory`; returns notes on what could not be carried over.

    A tokenizer.json is passed through. A SentencePiece model is converted to one, and kept beside it; where the
    conversion does not give the same ids on some text, only the model itself is written.
    """
    if tokenizer.path.suffix == ".json":
        shutil.copyfile(tokenizer.path, directory / "tokenizer.json")
    else:
        shutil.copyfile(tokenizer.path, directory / "tokenizer.model")
        converted = convert_sentencepiece(tokenizer.path)
        if not _agree(tokenizer, converted):
            return [
                f"{tokenizer.path.name} has no equal tokenizer.json: only the SentencePiece model was written, "
                "AutoTokenizer will not load it; encode with the sentencepiece package"
            ]
        converted.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.eod_token,
        "eos_token": tokenizer.eod_token,
        "pad_token": tokenizer.eod_token,
        # As in training, a special token that a text spells out is text.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return []


def convert_sentencepiece(path: Path) -> Any:
    """A tokenizers.Tokenizer with the pieces and ids of the SentencePiece model at `path`.

    Spaces stay spaces in its vocabulary, so that META_SPACE in a text is a character like any other. What the
    normaliser of the model does to text is not converted.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    ids = range(model.vocab_size())
    pieces = [model.id_to_piece(i).replace(META_SPACE, " ") for i in ids]
    plain = [i for i in ids if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))]
    has_bytes = any(model.is_byte(i) for i in ids)
    scores = {i: model.get_score(i) for i in plain}
    tokenizer = Tokenizer(_tokenizers_model(pieces, scores, has_bytes, model.unk_id()))
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if model.encode("a", out_type=str)[0].startswith(META_SPACE):
        tokenizer.normalizer = normalizers.Prepend(" ")
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(steps)
    special = [AddedToken(pieces[i], special=True, normalized=False) for i in ids if model.is_control(i)]
    tokenizer.add_special_tokens(special)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _tokenizers_model(pieces: list[str], scores: dict[int, float], has_bytes: bool, unknown: int) -> Any:
    from tokenizers import models

    # A byte-pair model numbers its merges with its scores: 0, -1, -2, ...
    if any(score != round(score) for score in scores.values()):
        # SentencePiece never finds the other pieces (control pieces, bytes) in text that spells them.
        listed = [(piece, scores.get(i, _NEVER)) for i, piece in enumerate(pieces)]
        return models.Unigram(listed, unk_id=unknown, byte_fallback=has_bytes)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    plain = {pieces[i]: score for i, score in scores.items()}
    merges = []
    for piece, score in plain.items():
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(-score, vocabulary[a], vocabulary[b], (a, b)) for a, b in splits if a in plain and b in plain]
    return models.BPE(
        vocabulary,
        [pair for *_, pair in sorted(merges)],
        unk_token=pieces[unknown],
        fuse_unk=True,
        byte_fallback=has_bytes,
    )


def _agree(tokenizer: ExportedTokenizer, converted: Any) -> bool:
    # This file is some kilobytes of text that is neither the sample nor made up for it.
    texts = [_SAMPLE, *_SAMPLE.split(), "", " ", "  a  ", Path(__file__).read_text(encoding="utf-8")]
    for text in texts:
        ids = converted.encode(text, add_special_tokens=False).ids
        if ids != list(tokenizer.encode(text)) or converted.decode(ids) != tokenizer.decode(ids):
            return False
    return True
