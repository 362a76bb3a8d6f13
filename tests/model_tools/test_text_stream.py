"""Text from tokens that come one by one, against the whole text at once, with real tokenizers."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_pipeline.tokenizing.config import TokenizerConfig
from data_pipeline.tokenizing.tokenizer import Tokenizer, train_sentencepiece
from model.generation.text import TextStream

# Characters of one to four bytes, of several code points, spaces in a row, and some that no corpus has.
TEXT = "def f(x):\n    return 'naïve café' # 你好, мир! 👩‍👩‍👧 \u200d e\u0301  ½ \ufffd end \U0001f980\U0001f980"

# Pieces of the tokenizer whose bytes are tokens behind them.
FIRST_BYTE = 500


@pytest.fixture(scope="module", params=["sentencepiece", "byte_level", "byte_fallback"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    text = Path(__file__).read_text(encoding="utf-8").replace(TEXT, "")
    if request.param == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(train_sentencepiece([text], TokenizerConfig(vocab_size=400)))
        return Tokenizer.load(folder)
    if request.param == "byte_level":
        library = LibraryTokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    else:
        # As Llama's: spaces are a sign, a text begins with one that is not shown, unknown characters are bytes.
        library = LibraryTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        library.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = ["<unk>", "<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=FIRST_BYTE, special_tokens=special[:2])
        library.train_from_iterator([text], trainer)
        assert library.get_vocab_size() == FIRST_BYTE
        library.add_tokens(special[2:])
    if request.param == "byte_level":
        library.train_from_iterator([text], trainer)
    library.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder, eod_token="<|endoftext|>")


def streamed(stream, ids):
    parts = [stream.add(token) for token in ids]
    return [*parts, stream.finish()]


def test_the_parts_are_the_whole_text_and_never_half_a_character(tokenizer):
    ids = tokenizer.encode(TEXT)
    whole = tokenizer.decode(ids)
    for cut in (0, 1, len(ids) // 2):
        before = tokenizer.decode(ids[:cut])
        if whole.startswith(before) and not before.endswith("\ufffd"):
            parts = streamed(TextStream(tokenizer.decode, ids[:cut]), ids[cut:])
            assert "".join(parts) == whole[len(before) :]
            assert sum(part.count("\ufffd") for part in parts[:-1]) <= whole.count("\ufffd")
            assert sum(map(bool, parts)) > len(ids[cut:]) // 4


def test_any_tokens_in_any_order_give_the_text_that_they_are(tokenizer):
    chooser = random.Random(4)
    # Where one of several bytes in a row fits nowhere, Llama's decoder takes back those before it; no stream can.
    choices = range(min(tokenizer.vocab_size, FIRST_BYTE))
    for _ in range(20):
        ids = chooser.choices(choices, k=150)
        parts = streamed(TextStream(tokenizer.decode, []), ids)
        assert "".join(parts) == tokenizer.decode(ids)


def test_each_token_costs_the_same_however_long_the_text():
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return "".join(chr(97 + token % 26) for token in ids)

    stream = TextStream(decode, range(1000))
    for token in range(5000):
        stream.add(token)
    assert max(decoded) <= 64


def letters(ids):
    return "".join(map(chr, ids))


def test_a_stop_string_ends_the_text_before_it_wherever_tokens_are_cut():
    stream = TextStream(letters, [], ["END", "stop"])
    assert [stream.add(ord(letter)) for letter in "a EN"] == ["a", " ", "", ""]
    assert stream.add(ord("x")) == "ENx" and not stream.stopped
    assert "".join(stream.add(ord(letter)) for letter in "ENsto") == "EN"
    assert stream.add(ord("p")) == "" and stream.stopped
    assert stream.add(ord("y")) == stream.finish() == ""


def test_the_earliest_stop_string_counts_and_the_prompt_does_not():
    pieces = {1: "one, two", 2: " three", 3: "tw"}

    def decode(ids):
        return "".join(pieces[token] for token in ids)

    stream = TextStream(decode, [1], ["three", "two", " t"])
    assert stream.add(2) == "" and stream.stopped
    stream = TextStream(decode, [3], ["two", "three"])
    # "tw" is of the prompt: what comes is searched by itself.
    assert stream.add(1) == "one, " and stream.stopped


def test_what_only_looked_like_a_stop_string_is_told_at_the_end():
    stream = TextStream(letters, [], ["aab"])
    assert "".join(streamed(stream, map(ord, "xaaa"))) == "xaaa"
    assert not stream.stopped


def test_a_stop_string_may_end_in_the_last_unfinished_character():
    stream = TextStream(letters, [], ["\ufffd"])
    assert streamed(stream, [97, 0xFFFD]) == ["a", "", ""] and stream.stopped


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop must not be empty"):
        TextStream(letters, [], ["a", ""])
