"""Text that a tokenizer loses is counted, warned of and refused; what a file leaves to chance is switched off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.inspection import show_corpus, verify_corpus
from data_pipeline.corpus.regroup import merge_corpora
from data_pipeline.errors import CorpusError, PrepareError, TokenizerError
from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.reading.live import LiveCorpus, LiveStream
from data_pipeline.sources.config import DataConfig, SplitConfig, ToleranceConfig
from data_pipeline.tokenizing.config import TokenizerConfig
from data_pipeline.tokenizing.encoders import ReferenceEncoder
from data_pipeline.tokenizing.lost_text import LostText, describe_losses
from data_pipeline.tokenizing.tokenizer import Tokenizer, train_sentencepiece
from tests.data_pipeline.small_corpora import quietly, sample_texts

CHINESE = "\u4e2d\u6587\u6d4b\u8bd5"
KNOWN = "the game self.value"
TEXTS = [KNOWN, f"{KNOWN} {CHINESE} {KNOWN}", CHINESE]
LOST = {1: 12, 2: 12}
BYTES = pre_tokenizers.ByteLevel.alphabet()


def build(folder: Path, model: models.Model, trainer: trainers.Trainer, before, normalizer=None, change=None) -> Path:
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = before
    if normalizer is not None:
        built.normalizer = normalizer
    built.train_from_iterator(sample_texts(), trainer)
    content = json.loads(built.to_str())
    if change is not None:
        change(content)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


def bpe(folder: Path, alphabet=(), before=None, change=None, **options) -> Path:
    special = ["<|endoftext|>", *([options["unk_token"]] if "unk_token" in options else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    before = before or pre_tokenizers.ByteLevel(add_prefix_space=False)
    return build(folder, models.BPE(**options), trainer, before, change=change)


def sentencepiece(folder: Path, **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    settings = {"vocab_size": 400, **options}
    path.write_bytes(train_sentencepiece(sample_texts(), TokenizerConfig(**settings)))
    return path


def word_level(folder: Path, **options) -> Path:
    special = ["</s>", *options.values()]
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    return build(folder, models.WordLevel(**options), trainer, pre_tokenizers.WhitespaceSplit())


def unigram(folder: Path, **options) -> Path:
    special = ["</s>", *options.values()]
    trainer = trainers.UnigramTrainer(special_tokens=special, vocab_size=120, show_progress=False, **options)
    return build(folder, models.Unigram(), trainer, pre_tokenizers.Metaspace())


def lost(path: Path, texts=TEXTS) -> dict[int, int]:
    tokenizer = Tokenizer.load(path)
    encoded = [text.encode() for text in texts]
    return LostText(tokenizer).of_batch(encoded, *ReferenceEncoder(tokenizer).encode(encoded))


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: bpe(folder, before=pre_tokenizers.Whitespace()),
        # Bytes of its training text only: of a character some bytes have a token and others none.
        lambda folder: bpe(folder),
        lambda folder: bpe(folder, unk_token="<unk>"),
        lambda folder: bpe(folder, unk_token="<unk>", before=pre_tokenizers.Whitespace(), fuse_unk=True),
        lambda folder: sentencepiece(folder, byte_fallback=False),
        lambda folder: sentencepiece(folder, byte_fallback=False, model_type="unigram", vocab_size=80),
        lambda folder: word_level(folder, unk_token="[UNK]"),
        lambda folder: unigram(folder, unk_token="<unk>"),
    ],
    ids=["bpe", "some bytes", "bytes and unknown", "fused", "sentencepiece", "spm unigram", "words", "unigram"],
)
def test_bytes_of_characters_without_a_token_are_counted(make, tmp_path):
    assert lost(make(tmp_path)) == LOST


@pytest.mark.parametrize("make", [lambda folder: bpe(folder, alphabet=BYTES), sentencepiece], ids=["bpe", "fallback"])
def test_tokenizers_with_all_bytes_lose_nothing_and_are_not_looked_at(make, tmp_path):
    path = make(tmp_path)
    tokenizer = Tokenizer.load(path)
    assert lost(path) == {} and describe_losses(tokenizer) == []
    assert tokenizer.unknown_id is None and not tokenizer.drops_characters


def test_what_a_tokenizer_does_not_keep_by_design_is_told_and_not_counted(tmp_path):
    trainer = trainers.WordPieceTrainer(special_tokens=["</s>", "[UNK]"], vocab_size=300, show_progress=False)
    path = build(
        tmp_path,
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(),
    )
    told = "\n".join(describe_losses(Tokenizer.load(path)))
    assert "does not keep capital letters, accents" in told and "line ends, runs of spaces" in told
    assert lost(path, ["THE GAM\u00c9\n\n  of"]) == {}


def write_source(folder: Path, texts: list[str]) -> DataConfig:
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    split = SplitConfig(validation_fraction=0.0)
    return DataConfig(kind="jsonl", path=str(folder), files=["*.jsonl"], split=split)


def settings(tmp_path: Path, texts: list[str], tokenizer: Path, **tolerance: float) -> PrepareConfig:
    data = write_source(tmp_path / "raw", texts)
    data = replace(data, tolerance=ToleranceConfig(**tolerance))
    return PrepareConfig(data, TokenizerConfig(kind="file", path=str(tokenizer)), str(tmp_path / "out"))


def test_prepare_counts_warns_and_refuses_what_the_tokenizer_loses(tmp_path, capsys):
    texts = [KNOWN] * 100 + [f"{KNOWN} \u4e2d"]
    config = settings(tmp_path, texts, bpe(tmp_path / "t"), lost_text_fraction=0.001)
    with pytest.raises(
        PrepareError,
        match=r"3 bytes of 1 documents \(0\.156%\) have no token, data\.tolerance\.lost_text_fraction allows 0\.100%"
        r"(?s:.*)a\.jsonl, record 101: 3 of 23 bytes have no token(?s:.*)raise the tolerance and run the same command",
    ):
        quietly(config)
    # As the message says.
    allowed = replace(config, data=replace(config.data, tolerance=ToleranceConfig(lost_text_fraction=0.01)))
    manifest, log = quietly(allowed)
    assert "characters that are not in its vocabulary vanish" in log
    assert "WARNING: the tokenizer lost 3 bytes (0.156% of the text) in 1 documents" in log
    assert manifest.inputs.lost == {"documents": 1, "bytes": 3}
    assert Corpus.open(config.output).manifest.inputs.lost == manifest.inputs.lost
    assert verify_corpus(Path(config.output)) == []
    (line,) = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert (line["action"], line["reason"], line["position"]) == ("lost", "no_token", 101)
    show_corpus(Path(config.output))
    assert "lost text    3 bytes in 1 documents have no token" in capsys.readouterr().out
    (tmp_path / "raw" / "a.jsonl").write_text(json.dumps({"text": f"{KNOWN} {CHINESE}"}) + "\n")
    tolerant = replace(allowed.data, tolerance=ToleranceConfig(lost_text_fraction=1))
    quietly(replace(allowed, output=str(tmp_path / "other"), data=tolerant))
    merged = merge_corpora([tmp_path / "out", tmp_path / "other"], tmp_path / "merged")
    assert merged.inputs.lost == {"documents": 2, "bytes": 15}


def test_documents_of_which_nothing_is_left_are_rejected(tmp_path):
    config = settings(tmp_path, [KNOWN] * 3 + [CHINESE * 450], bpe(tmp_path / "t", before=pre_tokenizers.Whitespace()))
    with pytest.raises(
        PrepareError, match=r"1 x no_token(?s:.*)record 4: no_token: the tokenizer makes no token of it"
    ):
        quietly(config)


def test_a_corpus_without_losses_says_nothing_of_them(tmp_path):
    manifest, log = quietly(settings(tmp_path, TEXTS, bpe(tmp_path / "t", alphabet=BYTES)))
    assert manifest.inputs.lost == {} and "lost" not in log
    assert '"lost"' not in (tmp_path / "out" / "manifest.json").read_text()


def test_text_tokenized_on_the_way_is_counted_too(tmp_path, caplog):
    path = bpe(tmp_path / "t")
    data = write_source(tmp_path / "raw", [KNOWN] * 100 + [f"{KNOWN} \u4e2d"])
    for allowed, problem in (
        (0.001, r"loses 0\.156% of the text \(first in a\.jsonl, record 101\)"),
        (0.1, "read 1 times"),
    ):
        tolerance = ToleranceConfig(lost_text_fraction=allowed)
        live = LiveCorpus(replace(data, tolerance=tolerance), TokenizerConfig(kind="file", path=str(path)), "train")
        assert any("vanish" in note for note in live.notes)
        stream = LiveStream(live, 8, 0, 1, 1)
        with pytest.raises(CorpusError, match=problem):
            for sample in range(10_000):
                stream.batch(sample, 1)
    assert "the tokenizer loses 0.156% of the text" in caplog.text


def test_dropout_is_switched_off_so_that_ids_repeat(tmp_path):
    path = bpe(tmp_path / "t", alphabet=BYTES, dropout=0.5)
    tokenizer = Tokenizer.load(path)
    assert "BPE dropout 0.5" in tokenizer.notes[0]
    assert len({tuple(tokenizer.encode(sample_texts()[0])) for _ in range(5)}) == 1
    manifest, log = quietly(settings(tmp_path, TEXTS, path))
    assert "dropout 0.5 of" in log and "is switched off" in log
    assert Corpus.open(tmp_path / "out").fingerprint == manifest.fingerprint


def test_other_ids_of_the_same_library_do_not_ask_to_install_it(tmp_path):
    quietly(settings(tmp_path, TEXTS, bpe(tmp_path / "t", alphabet=BYTES)))
    corpus = Corpus.open(tmp_path / "out")
    entry = replace(corpus.manifest.tokenizer, probe_sha256="0" * 64)
    with pytest.raises(CorpusError, match=r"the same tokenizers .* encoded text differently.*again elsewhere"):
        Corpus(tmp_path / "out", replace(corpus.manifest, tokenizer=entry)).tokenizer()
    with pytest.raises(CorpusError, match=r"encodes text differently from tokenizers 0\.1, .*install that version"):
        older = replace(entry, library_version="0.1")
        Corpus(tmp_path / "out", replace(corpus.manifest, tokenizer=older)).tokenizer()


@pytest.mark.parametrize("added", [True, False], ids=["added", "in the vocabulary"])
def test_an_end_of_document_token_that_is_not_marked_can_be_named(added, tmp_path):
    def unmark(content):
        if added:
            content["added_tokens"][0]["special"] = False
        else:
            content["added_tokens"] = []

    path = bpe(tmp_path / "t", alphabet=BYTES, change=unmark)
    advice = r"none is marked special\); set tokenizer\.eod_token to one that it has: <\|endoftext\|>"
    with pytest.raises(TokenizerError, match=advice):
        Tokenizer.load(path)
    tokenizer = Tokenizer.load(path, "<|endoftext|>")
    assert tokenizer.eod_id not in tokenizer.encode("a<|endoftext|>b <|endoftext|>")
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod_id]) == "a"
    tokenizer.save_to(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").eod_id == tokenizer.eod_id


@pytest.mark.parametrize(("make", "name"), [(word_level, "[UNK]"), (unigram, "<unk>")], ids=["words", "unigram"])
def test_a_vocabulary_that_spells_the_end_of_a_document_never_gives_it(make, name, tmp_path):
    tokenizer = Tokenizer.load(make(tmp_path, unk_token=name))
    for text in ("</s>", "the </s> game", "the</s>game</s></s>"):
        assert tokenizer.eod_id not in tokenizer.encode(text)
        assert tokenizer.eod_id not in tokenizer.encode_batch([KNOWN, text])[1]
        assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0].tolist()


@pytest.mark.parametrize("make", [word_level, unigram], ids=["words", "unigram"])
def test_a_model_that_fails_on_what_it_does_not_know_is_refused(make, tmp_path):
    with pytest.raises(TokenizerError, match=r"its unknown token \(.*\) is not in its vocabulary, so encoding fails"):
        Tokenizer.load(make(tmp_path))
