"""`python -m model average`: the mean of several models' weights."""

import dataclasses
import json
import shutil

import pytest
import torch

import model.averaging
from data_pipeline.tokenizing.config import TokenizerConfig
from data_pipeline.tokenizing.tokenizer import train_sentencepiece
from model import load
from model.__main__ import main
from model.averaging import average
from model.huggingface import export_huggingface
from model.loading import open_stored
from model.locate import locate
from model.weights import read_model_json, save_model
from tests.model_tools.small_models import CONFIGS, random_model

CONFIG = CONFIGS["mlstm"]


@pytest.fixture
def sources(tmp_path):
    """Weights directories of three models of one configuration."""
    for seed in range(3):
        save_model(random_model(CONFIG, seed), CONFIG, tmp_path / f"{seed}")
    return [tmp_path / f"{seed}" for seed in range(3)]


def expected(shares):
    """name -> sum of the shares of the weights, in float64."""
    models = [dict(random_model(CONFIG, seed).named_parameters()) for seed in range(len(shares))]
    return {
        name: (sum(share * m[name].detach().double() for m, share in zip(models, shares, strict=True))) / sum(shares)
        for name in models[0]
    }


@pytest.mark.parametrize("weights", [None, "1,2,5"])
def test_the_average_is_that_of_float64_in_one_file_or_several(weights, sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model.averaging, "SHARD_BYTES", 100_000)
    output = tmp_path / "averaged"
    settings = [f"output={output}", *([] if weights is None else [f"weights={weights}"])]
    assert main(["average", *map(str, sources), *settings]) == 0
    assert str(sources[2]) in capsys.readouterr().out
    assert len(list(output.glob("weights-*.safetensors"))) > 1
    wanted = expected([1.0, 1.0, 1.0] if weights is None else [1.0, 2.0, 5.0])
    found = dict(load(output).named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].float()) for name in wanted)
    assert read_model_json(output) == CONFIG
    parts = json.loads((output / "average.json").read_text())["sources"]
    assert [part["source"] for part in parts] == list(map(str, sources))
    assert sum(part["weight"] for part in parts) == pytest.approx(1)


def test_the_average_of_equal_weights_is_these(sources, tmp_path):
    average([open_stored(sources[0])] * 3, tmp_path / "out")
    found = dict(load(tmp_path / "out").named_parameters())
    assert all(torch.equal(found[n], p) for n, p in random_model(CONFIG, 0).named_parameters())


def test_models_that_cannot_be_averaged_are_refused_with_the_difference(sources, tmp_path, capsys):
    output = f"output={tmp_path / 'out'}"
    other = dataclasses.replace(CONFIG, n_blocks=2, norm_eps=1e-5)
    save_model(random_model(other), other, tmp_path / "other")
    assert main(["average", str(sources[0]), str(tmp_path / "other"), output]) == 2
    assert "are other models (n_blocks 3 and 2, norm_eps 1e-06 and 1e-05)" in capsys.readouterr().err
    assert main(["average", str(sources[0]), str(tmp_path / "none"), str(tmp_path / "no"), output]) == 2
    assert capsys.readouterr().err.count("does not exist") == 2
    assert main(["average", str(sources[0]), output, "weights=1;2"]) == 2
    error = capsys.readouterr().err
    assert "name two models or more" in error and "weights: numbers with commas" in error
    assert main(["average", *map(str, sources), output, "weights=1,2"]) == 2
    assert "give one number for each" in capsys.readouterr().err
    assert main(["average", *map(str, sources), output, "weigths=1,2,3"]) == 2
    assert "did you mean 'weights'?" in capsys.readouterr().err
    assert main(["average", *map(str, sources)]) == 2
    assert "output: a value is required" in capsys.readouterr().err
    assert main(["average", *map(str, sources), f"output={sources[0]}"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_the_tokenizer_comes_along_and_must_be_one(sources, tmp_path, capsys):
    texts = {"a": "abc abd abe " * 40, "b": "xyz xyw xyv " * 40}
    for source, text in zip(sources, ("a", "a", "b"), strict=True):
        (source / "tokenizer").mkdir()
        tokenizer = train_sentencepiece([texts[text]], TokenizerConfig(vocab_size=270))
        (source / "tokenizer" / "tokenizer.model").write_bytes(tokenizer)
    assert main(["average", *map(str, sources), f"output={tmp_path / 'out'}"]) == 2
    assert "ids mean other text to each model" in capsys.readouterr().err
    shutil.rmtree(sources[2] / "tokenizer")
    assert main(["average", *map(str, sources), f"output={tmp_path / 'out'}"]) == 0
    kept = locate(tmp_path / "out").tokenizer / "tokenizer.model"
    assert kept.read_bytes() == (sources[0] / "tokenizer" / "tokenizer.model").read_bytes()


def test_a_hugging_face_directory_is_read_by_ranges(tmp_path):
    """What a rank reads of it is what it holds, single or fused tensors alike."""
    source = random_model(CONFIG)
    export_huggingface(source, tmp_path / "theirs", verify=False)
    stored = open_stored(tmp_path / "theirs")
    for name, parameter in source.named_parameters():
        flat = parameter.detach().reshape(-1)
        for offset, numel in ((0, 1), (1, flat.numel() // 2), (flat.numel() - 1, 1)):
            assert torch.equal(stored.read_range(name, offset, numel), flat[offset : offset + numel]), name
