"""Weights and Hugging Face directories whose files hold anything: what is wrong is said, and with which file."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import ModelConfig
from model.config import AttentionConfig, MLSTMConfig, PreUpMLSTMConfig, validate_model
from model.huggingface import HuggingFaceError, HuggingFaceReader, export_huggingface
from model.language_model import LanguageModel
from model.locate import locate
from model.weights import WeightsError, WeightsReader, load_weights, read_model_json, save_model, write_model_json

CONFIG = ModelConfig(
    vocab_size=8, d_model=8, n_blocks=1, ffn_dim=8, logit_soft_cap=None, block="attention",
    attention=AttentionConfig(n_heads=2, n_kv_heads=1),
)  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", "8"),
        ("vocab_size", True),
        ("n_blocks", 1.5),
        ("slstm_at", {"0": 1}),
        ("slstm_at", ["x"]),
        ("other_at", [1]),
        ("attention", "x"),
        ("attention", []),
        ("norm_eps", None),
    ],
)
def test_a_value_of_another_type_in_a_model_json_is_refused(key, value, tmp_path):
    write_model_json(tmp_path, CONFIG)
    document = {"format_version": 1, "model": dataclasses.asdict(CONFIG) | {key: value}}
    (tmp_path / "model.json").write_text(json.dumps(document))
    with pytest.raises(WeightsError, match=rf"model\.json: model\.{key} cannot be "):
        read_model_json(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_blocks": 10**30}, r"model\.n_blocks: is 10*; it must be at most 100000"),
        ({"vocab_size": 2**63}, r"model\.vocab_size: is \d+; it must be at most"),
        ({"ffn_dim": 10**30}, r"model\.ffn_dim: is \d+; it must be at most"),
        ({"norm_eps": float("nan")}, r"model\.norm_eps: is nan"),
    ],
)
def test_numbers_that_no_model_can_have_are_refused_before_anything_is_made(changes, words, tmp_path):
    write_model_json(tmp_path, dataclasses.replace(CONFIG, **changes))
    with pytest.raises(WeightsError, match=rf"model\.json describes a model that does not work: .*{words}"):
        read_model_json(tmp_path)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e308])
def test_a_factor_that_gives_no_width_is_refused(factor):
    mlstm = ModelConfig(vocab_size=8, d_model=8, n_blocks=1, mlstm=MLSTMConfig(qk_dim_factor=factor))
    assert any("mlstm.qk_dim_factor: is " in problem for problem in validate_model(mlstm))
    preup = dataclasses.replace(mlstm, family="neurips", ffn_dim=None, mlstm=None)
    preup = dataclasses.replace(preup, preup_mlstm=PreUpMLSTMConfig(projection_factor=factor))
    assert any("preup_mlstm.projection_factor: is " in problem for problem in validate_model(preup))


@pytest.mark.parametrize(
    ("tensor", "shapes", "words"),
    [
        (torch.zeros(4), '{"w": 4}', "metadata do not give the shape"),
        (torch.zeros(4), '{"w": ["4"]}', "metadata do not give the shape"),
        (torch.zeros(4), '["w"]', "metadata do not give the shape"),
        (torch.zeros(4), "[" * 100_000, "metadata do not give the shape"),
        (torch.zeros(4), '{"w": [-4]}', r"w cannot have shape \[-4\]"),
        (torch.zeros(2, 2), '{"w": [4]}', "no flat part of a parameter"),
        (torch.zeros(()), '{"w": [1]}', "no flat part of a parameter"),
        (torch.zeros(4, dtype=torch.int64), '{"w": [4]}', "no flat part of a parameter"),
    ],
)
def test_a_header_of_weights_that_says_something_else_is_refused(tensor, shapes, words, tmp_path):
    save_file({"w@0": tensor}, tmp_path / "weights-0.safetensors", metadata={"format_version": "1", "shapes": shapes})
    with pytest.raises(WeightsError, match=rf"weights-0\.safetensors: .*{words}"):
        load_weights(tmp_path)


def test_a_file_of_weights_without_metadata_or_with_an_odd_offset_is_refused(tmp_path):
    path = tmp_path / "weights-0.safetensors"
    save_file({"w@0": torch.zeros(4)}, path, metadata={"format_version": "1"})
    with pytest.raises(WeightsError, match="metadata do not give the shape"):
        load_weights(tmp_path)
    # The second is a digit to Python, and no number.
    for offset in ("9" * 5000, "\u00b2"):
        save_file({f"w@{offset}": torch.zeros(4)}, path, metadata={"format_version": "1", "shapes": '{"w": [4]}'})
        with pytest.raises(WeightsError, match="unexpected tensor"):
            WeightsReader(tmp_path)


def test_a_pipe_in_the_place_of_weights_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "weights-0.safetensors")
    with pytest.raises(WeightsError, match="weights-0.safetensors cannot be read: it is no regular file"):
        load_weights(tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    save_model(LanguageModel(CONFIG), CONFIG, folder / "weights")
    export_huggingface(folder / "weights", folder / "exported", verify=False)
    return folder / "exported"


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": "x"},
        {"num_attention_heads": [2]},
        {"num_hidden_layers": float("inf")},
        {"num_hidden_layers": 10**30},
        {"rms_norm_eps": {}},
        {"rope_parameters": [1]},
        {"rope_theta": "x"},
        {"model_type": ["llama"]},
        {"head_dim": {}},
    ],
)
def test_a_value_of_another_kind_in_a_config_json_is_refused(change, exported, tmp_path):
    config = json.loads((exported / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(exported / "model.safetensors")
    with pytest.raises(HuggingFaceError, match="config.json describes a model|describes a model that does not work"):
        HuggingFaceReader(tmp_path)


@pytest.mark.parametrize("content", ["[1]", "7", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\0"])
def test_a_config_json_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(HuggingFaceError, match=r"config\.json cannot be read"):
        HuggingFaceReader(tmp_path)


def test_a_run_whose_config_is_no_yaml_has_weights_all_the_same(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000001"
    save_model(LanguageModel(CONFIG), CONFIG, folder / "weights")
    (folder / "complete.json").write_text("{}")
    for content in ("[" * 100_000, "training: {sequence_length: x}", "a: 2001-99-99", "training: 7"):
        (tmp_path / "config.yaml").write_text(content)
        assert locate(tmp_path).sequence_length is None
