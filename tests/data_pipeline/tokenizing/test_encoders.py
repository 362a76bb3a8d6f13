"""Faster libraries give the reference's ids or are not used, also when they differ only somewhere in the corpus."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import zstandard

from data_pipeline.errors import TokenizerError
from data_pipeline.tokenizing import encoders
from data_pipeline.tokenizing.config import TokenizerConfig
from data_pipeline.tokenizing.encoders import (
    DISTRIBUTIONS,
    PROBES,
    EncoderMismatchError,
    FastEncoder,
    ReferenceEncoder,
    build_encoder,
    choose_encoder,
)
from data_pipeline.tokenizing.tokenizer import Tokenizer
from tests.data_pipeline.small_corpora import quietly, random_text, sample_texts, slimpajama_config, write_slimpajama

SPECIAL_TEXTS = ["<|endoftext|>", "a <|padding|> b<|endoftext|>", "</s><s>x<unk>", "plain", ""]


def flat(parts) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate([np.asarray(part, dtype=np.uint32) for part in parts])
    return ids, np.concatenate(([0], np.cumsum([len(part) for part in parts])))


def parsing_specials(path: Path):
    """The same file read in the way in which a special token spelled in a text becomes that token."""
    model = tokenizers.Tokenizer.from_file(str(path))
    model.no_truncation()
    return lambda texts: flat([model.encode(t.decode(), add_special_tokens=False).ids for t in texts])


def pretend_installed(monkeypatch, encode, name: str = "gigatoken") -> None:
    """`encode` in the place of a library."""
    for other in encoders.BACKENDS:
        monkeypatch.setitem(encoders.DISTRIBUTIONS, other, "numpy" if other == name else f"no-such-{other}")
    monkeypatch.setitem(encoders.BACKENDS, name, lambda tokenizer: encode)


def equal_to_reference(encoder, tokenizer, texts: list[str]) -> None:
    data = [text.encode() for text in texts]
    for found, expected in zip(encoder.encode(data), ReferenceEncoder(tokenizer).encode(data), strict=True):
        assert found.tolist() == expected.tolist()


def test_the_reference_gives_what_the_tokenizer_gives(hugging_face_file, sentencepiece_file):
    for path in (hugging_face_file, sentencepiece_file):
        tokenizer = Tokenizer.load(path)
        texts = [*PROBES, *SPECIAL_TEXTS]
        ids, offsets = ReferenceEncoder(tokenizer).encode([text.encode() for text in texts])
        assert ids.dtype == np.uint16
        for number, text in enumerate(texts):
            assert ids[offsets[number] : offsets[number + 1]].tolist() == tokenizer.encode(text)


def test_a_library_that_reads_special_tokens_in_text_is_corrected(hugging_face_file):
    tokenizer = Tokenizer.load(hugging_face_file)
    parse = parsing_specials(hugging_face_file)
    assert tokenizer.eod_id in parse([SPECIAL_TEXTS[1].encode()])[0]
    encoder = _fast(parse, tokenizer)
    equal_to_reference(encoder, tokenizer, [*sample_texts(), *SPECIAL_TEXTS])
    ids, _ = encoder.encode([text.encode() for text in SPECIAL_TEXTS])
    assert not set(ids.tolist()) & set(tokenizer.special_ids)


def _fast(encode, tokenizer) -> FastEncoder:
    with pytest.MonkeyPatch.context() as patch:
        pretend_installed(patch, encode)
        return build_encoder(tokenizer, "gigatoken")


def test_a_library_that_differs_is_refused_with_the_text(hugging_face_file, monkeypatch):
    tokenizer = Tokenizer.load(hugging_face_file)
    parse = parsing_specials(hugging_face_file)

    def without_carriage_returns(texts):
        return parse([text.replace(b"\r", b"") for text in texts])

    pretend_installed(monkeypatch, without_carriage_returns)
    encoder, lines = choose_encoder(tokenizer, "auto", list)
    assert isinstance(encoder, ReferenceEncoder)
    assert any(line.startswith("not encoding with gigatoken: its ids differ from tokenizers") for line in lines)
    assert any(line.startswith("not encoding with splintr: not installed (pip install") for line in lines)
    assert lines[-1].startswith("encoding with tokenizers") and lines[-1].endswith("the reference")
    with pytest.raises(TokenizerError, match=r"tokenizer\.backend=gigatoken: its ids differ .*use auto or reference"):
        choose_encoder(tokenizer, "gigatoken", list)


def test_documents_of_the_corpus_are_compared_too(hugging_face_file, monkeypatch):
    tokenizer = Tokenizer.load(hugging_face_file)
    parse = parsing_specials(hugging_face_file)
    pretend_installed(monkeypatch, lambda texts: parse([text.replace(b"zebra", b"horse") for text in texts]))
    assert isinstance(choose_encoder(tokenizer, "auto", lambda: ["a horse"])[0], FastEncoder)
    encoder, lines = choose_encoder(tokenizer, "auto", lambda: ["a horse", "a zebra"])
    assert isinstance(encoder, ReferenceEncoder) and "'a zebra'" in lines[0]


def test_a_library_that_breaks_is_passed_over(hugging_face_file, monkeypatch):
    def panic(texts):
        raise PanicException("index out of bounds\nin some file")

    pretend_installed(monkeypatch, panic)
    encoder, lines = choose_encoder(Tokenizer.load(hugging_face_file), "auto", list)
    assert isinstance(encoder, ReferenceEncoder) and "not encoding with gigatoken: index out of bounds" in lines


def test_an_id_outside_the_vocabulary_is_refused(hugging_face_file):
    encoder = _fast(lambda texts: flat([[70_000]]), Tokenizer.load(hugging_face_file))
    with pytest.raises(EncoderMismatchError, match="gave an id outside the vocabulary of 494"):
        encoder.encode([b"x"])
    encoder = _fast(lambda texts: flat([[7]]), Tokenizer.load(hugging_face_file))
    with pytest.raises(EncoderMismatchError, match="it gave ids for 1 of 2 texts"):
        encoder.encode([b"x", b"y"])


def test_every_batch_is_sampled(hugging_face_file):
    tokenizer = Tokenizer.load(hugging_face_file)
    encoder = _fast(lambda texts: flat([[7] for _ in texts]), tokenizer)
    with pytest.raises(EncoderMismatchError, match="its ids differ from tokenizers"):
        encoder.encode([random_text(random.Random(0), 50).encode()])


CHOOSE_WITHOUT = """\
import sys
sys.modules.update(dict.fromkeys(sys.argv[2:]))
from data_pipeline.tokenizing.encoders import choose_encoder
from data_pipeline.tokenizing.tokenizer import Tokenizer
print(choose_encoder(Tokenizer.load(sys.argv[1]), "auto", list)[1][0])
"""


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        (["awkward"], "it needs the package awkward, which is not installed"),
        (["awkward_cpp"], "it needs the package awkward_cpp, which is not installed"),
        (["gigatoken", "awkward"], "not installed"),
    ],
)
def test_a_missing_package_beside_a_library_is_named(hugging_face_file, missing, reason):
    pytest.importorskip("gigatoken")
    command = [sys.executable, "-c", CHOOSE_WITHOUT, str(hugging_face_file), *missing]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=True)
    remedy = "(pip install '.[fast-prepare]' or pip install gigatoken)"
    assert done.stdout.strip() == f"not encoding with gigatoken: {reason} {remedy}"


class PanicException(BaseException):
    """What a Rust library raises when it fails."""


@pytest.mark.parametrize("breaks", [False, True])
def test_what_a_library_encoded_before_it_was_found_to_differ_is_encoded_again(
    hugging_face_file, tmp_path, monkeypatch, breaks
):
    write_slimpajama(tmp_path / "raw", files=6)
    odd = tmp_path / "raw" / "train" / "chunk1" / "example_train_4.jsonl.zst"
    record = {"text": "zebra " * 100, "meta": {"redpajama_set_name": "RedPajamaC4"}}
    odd.write_bytes(zstandard.compress(json.dumps(record).encode()))
    settings = TokenizerConfig(kind="file", path=str(hugging_face_file))
    config = slimpajama_config(
        tmp_path / "raw", tmp_path / "reference", tokenizer=replace(settings, backend="reference")
    )
    expected, _ = quietly(config)
    parse = parsing_specials(hugging_face_file)

    def odd_encode(texts):
        if breaks and any(b"zebra" in text for text in texts):
            raise PanicException("called unwrap on a zebra\nin some file")
        return parse([text.replace(b"zebra", b"horse") for text in texts])

    pretend_installed(monkeypatch, odd_encode)
    # The sample of the gate ends before the odd file.
    monkeypatch.setattr("data_pipeline.preparing.prepare.COMPARED_BYTES", 2000)
    found, log = quietly(replace(config, output=str(tmp_path / "out"), tokenizer=settings))
    assert "is not used any more, and what it encoded will be encoded again: " in log
    assert "again: called unwrap on a zebra" in log if breaks else "ids differ from tokenizers" in log
    assert found.fingerprint == expected.fingerprint
    assert [shard.sha256 for shard in found.shards] == [shard.sha256 for shard in expected.shards]


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
def test_the_libraries_that_are_installed_give_the_ids_of_the_reference(name, hugging_face_file, sentencepiece_file):
    pytest.importorskip(name)
    rng = random.Random(3)
    planes = [
        (32, 127),
        (0xA0, 0x24F),
        (0x370, 0x5FF),
        (0x900, 0xDFF),
        (0x2000, 0x2BFF),
        (0x3040, 0x9FFF),
        (0x1F300, 0x1FAFF),
    ]
    texts = ["".join(chr(rng.randint(*rng.choice(planes))) for _ in range(200)) for _ in range(50)]
    for path in (hugging_face_file, sentencepiece_file):
        tokenizer = Tokenizer.load(path)
        encoder, _ = choose_encoder(tokenizer, "auto", sample_texts, {})
        if encoder.backend == name:
            equal_to_reference(encoder, tokenizer, [*texts, *SPECIAL_TEXTS, *PROBES, *sample_texts()])
        try:
            encoder = build_encoder(tokenizer, name)
        except TokenizerError as error:
            assert "does not read SentencePiece" in str(error)
            continue
        equal_to_reference(encoder, tokenizer, [*SPECIAL_TEXTS, *sample_texts()])
