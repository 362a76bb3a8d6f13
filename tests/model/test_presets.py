import dataclasses
import typing
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from conf import CONF_DIR, compose
from model.config import (
    AttentionConfig,
    MLSTMConfig,
    ModelConfig,
    ModelOnlyConfig,
    PreUpMLSTMConfig,
    SLSTMConfig,
    validate_model,
)
from model.language_model import LanguageModel
from model.layers import further_kinds

# Parameters and tensors. The ladder, the 7B and the NeurIPS models with a published count have exactly that one.
COUNTS = {
    "mamba2_400m": (406_672_192, 417),
    "mamba2_160m": (163_870_072, 210),
    "gated_deltanet_400m": (405_732_640, 363),
    "gated_deltanet_160m": (164_296_152, 183),
    "retnet_400m": (408_257_536, 267),
    "retnet_160m": (164_008_704, 135),
    "gla_400m": (407_262_208, 339),
    "gla_160m": (164_225_280, 171),
    "hybrid_160m": (164_726_184, 231),
    "hybrid_400m": (406_829_224, 345),
    "llama_160m": (163_990_272, 111),
    "llama_1b4": (1_420_396_544, 219),
    "llama_400m": (406_635_520, 219),
    "llama_7b": (6_863_196_160, 291),
    "neurips_125m_1_0": (163_806_144, 339),
    "neurips_125m_7_1": (163_690_928, 337),
    "neurips_1b3_1_0": (1_422_367_104, 675),
    "neurips_1b3_7_1": (1_419_872_592, 669),
    "neurips_350m_1_0": (409_290_112, 675),
    "neurips_350m_7_1": (408_436_048, 669),
    "neurips_760m_1_0": (840_427_392, 675),
    "neurips_760m_7_1": (839_736_144, 669),
    "parallel_160m": (164_119_440, 231),
    "parallel_400m": (406_881_472, 459),
    "synthetic_0_1": (74_688, 25),
    "synthetic_1_0": (68_560, 31),
    "synthetic_1_1": (71_624, 28),
    "synthetic_llama": (115_008, 21),
    "tiny": (3_300_882, 62),
    "tiny_llama": (3_344_064, 39),
    "tiny_mlstm": (2_332_056, 93),
    "tiny_neurips": (2_272_336, 44),
    "xlstm_160m": (164_110_224, 183),
    "xlstm_1b4": (1_420_839_104, 363),
    "xlstm_2b7": (2_780_449_600, 483),
    "xlstm_400m": (406_856_896, 363),
    "xlstm_7b": (6_865_424_896, 483),
    "xlstm_7b_mixed": (6_991_875_200, 2371),
    "xlstm_80m": (83_680_848, 153),
    "xlstm_830m": (841_496_256, 363),
}
SECTIONS = {"mlstm": MLSTMConfig, "preup_mlstm": PreUpMLSTMConfig, "slstm": SLSTMConfig, "attention": AttentionConfig}


def preset(name: str) -> ModelConfig:
    return compose(ModelOnlyConfig, "model_only", [f"model={name}"]).model


def test_every_preset_file_has_a_count_here():
    assert {path.stem for path in Path(CONF_DIR, "model").glob("*.yaml")} == set(COUNTS)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_parameters_and_tensors(name):
    config = preset(name)
    assert validate_model(config) == []
    with torch.device("meta"):
        parameters = list(LanguageModel(config).parameters())
    assert (sum(parameter.numel() for parameter in parameters), len(parameters)) == COUNTS[name]


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_a_preset_states_every_value_and_its_count(name):
    path = Path(CONF_DIR, "model", f"{name}.yaml")
    tree = OmegaConf.load(path)
    defaults = OmegaConf.load(Path(CONF_DIR, "model_defaults.yaml"))
    assert set(tree) | set(defaults) == {field.name for field in dataclasses.fields(ModelConfig)}
    # Kinds without a section of their own have their settings in `layers`.
    assert set(tree) & set(defaults) <= {"layers", "other_at"}
    for name_of_kind, section in tree.get("layers", {}).items():
        (kind,) = [kind for kind in further_kinds() if kind.name == name_of_kind]
        assert_states_every_value(section, kind.settings_class)
    for key, schema in SECTIONS.items():
        if tree[key] is not None:
            assert set(tree[key]) == {field.name for field in dataclasses.fields(schema)}, key
    comment = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"{COUNTS[name][0]:,} parameters" in comment


def assert_states_every_value(section, schema):
    types = typing.get_type_hints(schema)
    assert set(section) == {field.name for field in dataclasses.fields(schema)}
    for key, annotation in types.items():
        if dataclasses.is_dataclass(annotation):
            assert_states_every_value(section[key], annotation)


PEERS = ["hybrid", "parallel", "llama", "gla", "retnet", "mamba2", "gated_deltanet"]


@pytest.mark.parametrize("size", ["160m", "400m"])
@pytest.mark.parametrize("name", PEERS)
def test_what_is_compared_with_an_xlstm_has_its_size_within_2_percent(name, size):
    ours, theirs = COUNTS[f"xlstm_{size}"][0], COUNTS[f"{name}_{size}"][0]
    assert theirs == pytest.approx(ours, rel=0.02)


def test_hybrids_have_seven_mlstm_blocks_for_each_one_of_attention():
    for name in ("hybrid_160m", "hybrid_400m"):
        kinds = preset(name).block_kinds()
        assert [kind == "attention" for kind in kinds] == [index % 8 == 7 for index in range(len(kinds))]


def test_what_presets_leave_out_has_the_defaults_of_the_dataclass():
    defaults = OmegaConf.to_container(OmegaConf.load(Path(CONF_DIR, "model_defaults.yaml")))
    assert defaults == {key: getattr(ModelConfig(), key) for key in defaults} and len(defaults) == 3


def test_placement_of_slstm_blocks():
    assert preset("neurips_125m_7_1").slstm_at == [3, 20]
    assert preset("neurips_1b3_7_1").slstm_at == [3, 5, 7, 40, 42, 44]
    kinds = preset("xlstm_7b_mixed").block_kinds()
    assert (kinds.count("mlstm"), kinds.count("slstm")) == (128, 32)
    assert [kind == "slstm" for kind in kinds] == [index % 5 == 4 for index in range(160)]


def test_the_default_of_model_only_is_the_7b():
    assert compose(ModelOnlyConfig, "model_only").model == preset("xlstm_7b") == ModelConfig(mlstm=MLSTMConfig())
