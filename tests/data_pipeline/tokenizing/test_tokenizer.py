"""Text comes back exactly, special tokens in it stay text, and a tokenizer is known by its fingerprint."""

from __future__ import annotations

import json
import re

import pytest

from data_pipeline.errors import TokenizerError
from data_pipeline.tokenizing.config import TokenizerConfig
from data_pipeline.tokenizing.tokenizer import PROBE, Tokenizer, train_sentencepiece
from tests.data_pipeline.small_corpora import TOKENIZER, sample_texts

HARD_TEXTS = [
    "",
    " ",
    "  two  spaces and a tab\t\n\n    indented\r\nlast line without end",
    "\n\n\n",
    "</s><s><unk><|endoftext|><0x0A>",
    "\x00 nul, \ufeff mark, e\u0301 \u00e9, \u4e2d\u6587, \U0001f469\u200d\U0001f469, \u2581 \u2581\u2581x \u2581",
    "a" * 50_000,
    PROBE,
]
SPECIALS = "</s> <s> <|endoftext|> x</s>"


@pytest.fixture(params=["sentencepiece_file", "hugging_face_file"])
def tokenizer(request):
    return Tokenizer.load(request.getfixturevalue(request.param))


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [int(i) for i in tokenizer.encode_batch([text, "x"])[0]] == ids


def test_special_tokens_in_text_never_become_the_end_of_a_document(tokenizer):
    ids = tokenizer.encode(SPECIALS)
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == SPECIALS
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == SPECIALS


def test_control_tokens_are_what_no_text_becomes(tokenizer):
    assert tokenizer.control_tokens[tokenizer.eod_token] == tokenizer.eod_id and "<unk>" not in tokenizer.control_tokens
    assert set(tokenizer.control_tokens.values()) <= set(tokenizer.special_ids)
    ids = tokenizer.encode("".join(tokenizer.control_tokens))
    assert not set(ids) & set(tokenizer.control_tokens.values())


def test_saved_copy_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save_to(tmp_path / "copy")
    copy = Tokenizer.load(tmp_path / "copy")
    assert (copy.fingerprint, copy.eod_id, copy.vocab_size) == (
        tokenizer.fingerprint,
        tokenizer.eod_id,
        tokenizer.vocab_size,
    )
    assert copy.probe_sha256 == tokenizer.probe_sha256


def test_decode_refuses_ids_outside_the_vocabulary(tokenizer):
    with pytest.raises(ValueError, match=rf"ids must be in 0\.\.{tokenizer.vocab_size - 1}, got 0\.\.99999"):
        tokenizer.decode([0, 99999])


def test_training_is_deterministic_and_has_the_size_asked_for(sentencepiece_file):
    assert train_sentencepiece(sample_texts(), TOKENIZER) == sentencepiece_file.read_bytes()
    assert Tokenizer.load(sentencepiece_file).vocab_size == TOKENIZER.vocab_size


def test_fingerprints_differ(sentencepiece_file, hugging_face_file, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(train_sentencepiece(sample_texts(), TokenizerConfig(vocab_size=390)))
    changed = json.loads(hugging_face_file.read_text())
    changed["decoder"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    paths = [sentencepiece_file, hugging_face_file, other, tmp_path / "tokenizer.json"]
    assert len({Tokenizer.load(path).fingerprint for path in paths}) == 4


def test_the_end_of_document_token_can_be_chosen_and_is_remembered(hugging_face_file, tmp_path):
    chosen = Tokenizer.load(hugging_face_file, eod_token="<|padding|>")
    assert (chosen.eod_id, Tokenizer.load(hugging_face_file).eod_id) == (1, 0)
    chosen.save_to(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").eod_id == 1
    assert chosen.fingerprint != Tokenizer.load(hugging_face_file).fingerprint


def test_files_that_are_no_tokenizers_are_refused(tmp_path, hugging_face_file, sentencepiece_file):
    with pytest.raises(TokenizerError, match=r"no such tokenizer file.*tokenizer\.path"):
        Tokenizer.load(tmp_path / "missing.model")
    for name, message in (("a.model", "not a SentencePiece model"), ("a.json", "not a Hugging Face tokenizer.json")):
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.load(tmp_path / name)
    with pytest.raises(TokenizerError, match=r"set tokenizer\.eod_token to one of them"):
        Tokenizer.load(hugging_face_file, eod_token="<missing>")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"empty: holds no tokenizer\.model or tokenizer\.json; name the file"):
        Tokenizer.load(tmp_path / "empty")
    with pytest.raises(TokenizerError, match="has no end-of-document piece <missing>"):
        Tokenizer.load(sentencepiece_file, eod_token="<missing>")
    with pytest.raises(TokenizerError, match="an ordinary piece that text can spell"):
        Tokenizer.load(sentencepiece_file, eod_token="e")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 5000}, r"at most 292 pieces with tokenizer\.vocab_size=5000 .*; give more text"),
        (
            {"vocab_size": 5000, "byte_fallback": False},
            r"at most (\d+) pieces with .*; set tokenizer\.vocab_size=\1, or give more text",
        ),
        (
            {"vocab_size": 32, "byte_fallback": False, "character_coverage": 1.0},
            r"need (\d+) pieces with .*; set tokenizer\.vocab_size=\1 or more, or lower",
        ),
    ],
    ids=["too little text", "too large", "too small"],
)
def test_a_vocabulary_that_does_not_fit_the_text_is_refused_with_the_size_that_does(settings, message):
    texts = ["just a few words that are all different, of the kind: " + "".join(map(chr, range(65, 123)))]
    if "byte_fallback" not in settings:
        texts = ["just a few words"]
    with pytest.raises(TokenizerError, match=message) as refused:
        train_sentencepiece(texts, TokenizerConfig(**settings))
    if found := re.search(r"set tokenizer\.vocab_size=(\d+)", str(refused.value)):
        # As the message says.
        assert train_sentencepiece(texts, TokenizerConfig(**{**settings, "vocab_size": int(found[1])}))
