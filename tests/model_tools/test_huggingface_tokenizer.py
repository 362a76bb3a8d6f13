"""Exported tokenizers: AutoTokenizer must give the ids that the model was trained on."""

import dataclasses
import inspect
import io
import json

import pytest
import sentencepiece
import tokenizers
import transformers

from data_pipeline.tokenizing.config import TokenizerConfig
from data_pipeline.tokenizing.tokenizer import Tokenizer, train_sentencepiece
from model.huggingface import HuggingFaceError, export_huggingface
from model.huggingface.tokenizer import export_tokenizer
from tests.model_tools.small_models import CONFIGS, random_model

TEXTS = [
    "def f(x):\n\treturn x ** 2\n\n\n",
    "  two  spaces   and a tail   ",
    "caf\u00e9 e\u0301 \u4e2d\u6587 \U0001f469\u200d\U0001f467 \ufeff",
    "a \u2581 literal \u2581\u2581 meta space",
    "<s></s><unk> spelled <|endoftext|> out",
    "0123456789 3.14159 1,000,000",
    "",
]


def sources():

    return [inspect.getsource(json.decoder), inspect.getsource(dataclasses), *TEXTS] * 3


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def sentencepiece_model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(sources(), TokenizerConfig(vocab_size=600, model_type=request.param)))
    return Tokenizer.load(path)


def byte_level_json(path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sources(), trainer)
    backend.save(str(path))


def check_same(tokenizer, directory):
    loaded = transformers.AutoTokenizer.from_pretrained(directory)
    for text in [*TEXTS, sources()[0]]:
        ids = loaded(text)["input_ids"]
        assert ids == list(tokenizer.encode(text))
        assert loaded.decode(ids) == tokenizer.decode(ids)
    for token_id in (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id):
        assert token_id == tokenizer.eod_id
    assert loaded.decode([tokenizer.eod_id], skip_special_tokens=True) == ""


def test_sentencepiece_gives_the_same_ids_in_transformers(sentencepiece_model, tmp_path):
    assert export_tokenizer(sentencepiece_model, tmp_path) == []
    (tmp_path / "config.json").write_text('{"model_type": "xlstm"}')
    assert (tmp_path / "tokenizer.model").read_bytes() == sentencepiece_model.path.read_bytes()
    check_same(sentencepiece_model, tmp_path)


def test_tokenizer_json_passes_through(tmp_path):
    byte_level_json(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "out").mkdir()
    assert export_tokenizer(tokenizer, tmp_path / "out") == []
    (tmp_path / "out" / "config.json").write_text('{"model_type": "xlstm"}')
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    check_same(tokenizer, tmp_path / "out")


def test_a_model_whose_normaliser_cannot_be_converted_is_shipped_alone(tmp_path):

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sources()), model_writer=written, vocab_size=308, byte_fallback=True, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    (tmp_path / "out").mkdir()
    [note] = export_tokenizer(Tokenizer.load(tmp_path / "tokenizer.model"), tmp_path / "out")
    assert "only the SentencePiece model was written" in note
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer.model"]


def test_export_writes_the_ids_of_the_tokenizer(tmp_path):
    byte_level_json(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")

    config = dataclasses.replace(CONFIGS["mlstm"], vocab_size=512)
    assert export_huggingface(random_model(config), tmp_path / "out", tokenizer) == []
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (loaded.bos_token_id, loaded.eos_token_id) == (tokenizer.eod_id, tokenizer.eod_id)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.eod_id
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab_size() == 500
    with pytest.raises(HuggingFaceError, match=r"the tokenizer has 500 ids but model\.vocab_size is 96"):
        export_huggingface(random_model(CONFIGS["mlstm"]), tmp_path / "other", tokenizer)
