"""Configurations that earlier versions stored: read, and compared with today's."""

import dataclasses
import json

import pytest

from model.config import AttentionConfig, MLSTMConfig, ModelConfig, PreUpMLSTMConfig
from model.stored import what_is_computed, with_current_keys
from model.weights import WeightsError, read_model_json, write_model_json

SEVEN_B = ModelConfig(mlstm=MLSTMConfig(reference_chunk_size=16))
NEURIPS = ModelConfig(family="neurips", ffn_dim=None, preup_mlstm=PreUpMLSTMConfig(reference_chunk_size=32))
# What 0.2.0 did not know.
NEW = ("other_at", "layers", "plugins")


def as_of_0_1_0(config: ModelConfig) -> dict:
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in NEW}
    for section in ("mlstm", "preup_mlstm"):
        if values[section] is not None:
            values[section]["chunk_size"] = values[section].pop("reference_chunk_size")
    return values


@pytest.mark.parametrize("config", [SEVEN_B, NEURIPS], ids=["7b", "neurips"])
def test_a_model_json_of_0_1_0_is_read(tmp_path, config):
    path = write_model_json(tmp_path, config)
    document = json.loads(path.read_text())
    document["model"] = as_of_0_1_0(config)
    path.write_text(json.dumps(document))
    assert read_model_json(tmp_path) == config


def test_what_no_version_knew_is_refused(tmp_path):
    path = write_model_json(tmp_path, SEVEN_B)
    document = json.loads(path.read_text())
    document["model"]["mlstm"]["chunks"] = 3
    path.write_text(json.dumps(document))
    with pytest.raises(WeightsError, match=r"unknown keys model\.mlstm\.chunks"):
        read_model_json(tmp_path)


def test_keys_of_today_stay_as_they_are():
    values = dataclasses.asdict(SEVEN_B)
    assert with_current_keys(values) == values
    assert with_current_keys({"mlstm": None}) == {"mlstm": None}


def test_an_old_configuration_computes_the_same_whatever_its_speed():
    faster = dataclasses.replace(SEVEN_B, mlstm=MLSTMConfig(reference_chunk_size=8, backend="reference"))
    assert what_is_computed(as_of_0_1_0(SEVEN_B)) == what_is_computed(dataclasses.asdict(faster))
    other = dataclasses.replace(SEVEN_B, mlstm=MLSTMConfig(cell_eps=1e-5))
    assert what_is_computed(as_of_0_1_0(SEVEN_B)) != what_is_computed(dataclasses.asdict(other))


def test_settings_of_a_plugin_count_and_where_it_is_found_does_not():
    def stored(width: int, plugin: str) -> dict:
        return dataclasses.asdict(
            dataclasses.replace(SEVEN_B, layers={"toy": {"width": width}}, plugins=[plugin], other_at={"toy": [1]})
        )

    assert what_is_computed(stored(3, "a")) == what_is_computed(stored(3, "b.c"))
    assert what_is_computed(stored(3, "a")) != what_is_computed(stored(4, "a"))


def test_what_a_stored_section_leaves_out_has_its_default():
    """As in runs of versions before a setting was added."""
    llama = ModelConfig(block="attention", attention=AttentionConfig())
    old = dataclasses.asdict(llama)
    for key in ("positions", "window", "sinks"):
        del old["attention"][key]
    assert what_is_computed(old) == what_is_computed(dataclasses.asdict(llama))
    windowed = dataclasses.replace(llama, attention=AttentionConfig(window=8))
    assert what_is_computed(old) != what_is_computed(dataclasses.asdict(windowed))


def test_of_a_kind_in_layers_what_only_chooses_the_speed_does_not_count():
    def stored(**of_mlstm) -> dict:
        layers = {"mlstm_attention": {"mlstm": of_mlstm}}
        return dataclasses.asdict(ModelConfig(block="mlstm_attention", layers=layers))

    assert what_is_computed(stored()) == what_is_computed(stored(backend="reference", n_heads=8))
    assert what_is_computed(stored()) != what_is_computed(stored(n_heads=4))
    begun = [what_is_computed(stored(igate_bias_init=value), first_values=False) for value in (-10.0, -3.0)]
    assert begun[0] == begun[1] and what_is_computed(stored()) != what_is_computed(stored(igate_bias_init=-3.0))
