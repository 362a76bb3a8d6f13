"""The tokenizer of a corpus: the keys under `tokenizer`, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass

from conf.problems import at_least, between, choice, positive

TOKENIZER_KINDS = ("sentencepiece", "file")
MODEL_TYPES = ("bpe", "unigram")
BACKENDS = ("auto", "reference", "gigatoken", "fastokens", "splintr")


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: trained on the corpus (`kind=sentencepiece`) or read (`kind=file`)."""

    # "sentencepiece": trained on the corpus. "file": read from path.
    kind: str = "sentencepiece"
    # kind=file: a SentencePiece .model, a Hugging Face tokenizer.json, or a folder with one of them.
    path: str | None = None
    # The token that ends a document, where the file leaves it open; null: found out.
    eod_token: str | None = None
    # Library that encodes: "auto" takes the fastest that is installed and gives the ids of the reference (sentencepiece
    # or tokenizers), "reference" the latter, a name that one or none.
    backend: str = "auto"
    # kind=sentencepiece: token ids of the trained tokenizer.
    vocab_size: int = 4096
    # kind=sentencepiece: "bpe" or "unigram".
    model_type: str = "bpe"
    # UTF-8 bytes of training documents that the tokenizer is trained on.
    sample_bytes: int = 6_000_000
    # kind=sentencepiece: share of the sample's characters that get a piece of their own.
    character_coverage: float = 0.9999
    # Bytes stand in for characters without a piece, so that every text can be encoded and decoded exactly.
    byte_fallback: bool = True
    # kind=sentencepiece: every digit is a token.
    split_digits: bool = True


def smallest_vocabulary(config: TokenizerConfig) -> int:
    """The least `vocab_size` of a trained tokenizer that is accepted: bytes and some characters must fit in."""
    return 300 if config.byte_fallback else 32


def validate_tokenizer(config: TokenizerConfig, prefix: str = "tokenizer") -> list[str]:
    """Every problem of a TokenizerConfig, one line each."""
    problems = choice(f"{prefix}.kind", config.kind, TOKENIZER_KINDS, "kind")
    if config.kind == "file" and not config.path:
        problems.append(f"{prefix}.path: kind=file needs a path; set {prefix}.path=FILE")
    problems += choice(f"{prefix}.backend", config.backend, BACKENDS, "library")
    if config.kind != "sentencepiece":
        return problems
    if config.path is not None:
        problems.append(f"{prefix}.path: a trained tokenizer has no path ('{config.path}'); set {prefix}.kind=file")
    if config.eod_token is not None:
        problems.append(f"{prefix}.eod_token: a trained tokenizer ends documents with '</s>'; set it to null")
    problems += choice(f"{prefix}.model_type", config.model_type, MODEL_TYPES, "type")
    problems += at_least(f"{prefix}.vocab_size", config.vocab_size, smallest_vocabulary(config))
    problems += positive(f"{prefix}.sample_bytes", config.sample_bytes)
    return problems + between(f"{prefix}.character_coverage", config.character_coverage, 0.9, 1)
