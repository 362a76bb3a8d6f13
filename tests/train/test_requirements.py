"""What a run needs of an earlier start's folder: the same run, also where another version of this program began it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from conf import ConfigError, compose
from train.config import RunConfig
from train.data import describe_data
from train.requirements import open_requirements


def started(overrides, change=lambda stored: None) -> RunConfig:
    """The configuration of a run whose folder holds what `change` made of its config.yaml."""
    config = compose(RunConfig, "train", [*overrides, "training.total_steps=3"])
    folder = Path(config.run_root) / config.name
    folder.mkdir()
    stored = OmegaConf.to_container(OmegaConf.structured(config))
    change(stored)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(stored)))
    return config


def test_a_key_that_came_later_counts_as_its_default(tiny_run):
    def as_before(stored):
        for section, key in (("corpus", "window_shards"), ("corpus", "phases"), ("model", "tie_embeddings")):
            del stored[section][key]
        del stored["model"]["mlstm"]["normaliser"]
        del stored["model"]["slstm"]["conv_kernel_size"]
        stored["model"]["mlstm"]["chunk_size"] = stored["model"]["mlstm"].pop("reference_chunk_size")

    config = started(tiny_run, as_before)
    assert open_requirements(config, 2).directory.config.exists()
    # A value other than the default is a change.
    tied = dataclasses.replace(config, model=dataclasses.replace(config.model, tie_embeddings=True))
    with pytest.raises(
        ConfigError,
        match=r"model\.tie_embeddings: .* was started with another value \(false, now true\); give the run",
    ):
        open_requirements(tied, 2)


def test_what_only_chooses_how_fast_the_same_is_computed_may_change(tiny_run):
    config = started(tiny_run)
    mlstm = dataclasses.replace(config.model.mlstm, backend="reference", reference_chunk_size=8)
    faster = dataclasses.replace(config, model=dataclasses.replace(config.model, mlstm=mlstm))
    assert open_requirements(faster, 1).plan.world_size == 1


def test_a_section_that_came_later_counts_as_its_default(tiny_run):
    def without_logging(stored):
        del stored["logging"], stored["corpus"]["live"]

    assert open_requirements(started(tiny_run, without_logging), 1).plan.replicas == 1


def test_a_change_is_refused_with_the_settings_to_type(tiny_run):
    config = started(tiny_run)
    changed = dataclasses.replace(
        config, seed=3, model=dataclasses.replace(config.model, tie_embeddings=True, logit_soft_cap=1.0)
    )
    with pytest.raises(ConfigError) as refused:
        open_requirements(changed, 1)
    text = str(refused.value)
    assert "give the run another name=..., or set seed=0" in text
    cap = "null" if config.model.logit_soft_cap is None else config.model.logit_soft_cap
    assert f"set model.logit_soft_cap={cap}" in text and "set model.tie_embeddings=false" in text


@pytest.mark.parametrize("key", ["total_steps", "total_tokens"])
def test_too_little_text_asks_to_lower_the_length_that_was_given(key, tiny_run):
    other = {"total_steps": "total_tokens", "total_tokens": "total_steps"}[key]
    overrides = [line for line in tiny_run if "total_" not in line]
    config = compose(
        RunConfig, "train", [*overrides, f"training.{key}=100_000_000", f"training.{other}=null", "corpus.max_epochs=1"]
    )
    with pytest.raises(ConfigError, match=f"corpus.max_epochs: .*; lower training.{key}, prepare more data"):
        open_requirements(config, 1)


def test_ids_that_no_text_uses_are_hinted_at_and_padding_is_not(tiny_run):
    said = {}
    for ids in (320, 384, 448, 4096):
        config = compose(RunConfig, "train", [*tiny_run, f"model.vocab_size={ids}", "training.total_steps=3"])
        found = open_requirements(config, 1)
        said[ids] = describe_data(config, found.plan, found.stream)
    assert [ids for ids, text in said.items() if "vocabulary HINT" in text] == [448, 4096]
    wasted = (4096 - 320) * config.model.d_model * 2
    assert f"the tokenizer has 320 ids, the model 4,096: {wasted:,} parameters" in said[4096]
    assert "model.vocab_size=320 is enough" in said[4096]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes CUDA graphs")
def test_cuda_graphs_need_a_gpu_and_gradients_that_are_read_at_once(tiny_run):
    def open_with(*overrides):
        settings = [*tiny_run, "training.total_steps=3", "training.cuda_graphs=true", "precision=bf16", *overrides]
        return open_requirements(compose(RunConfig, "train", settings), 1)

    with pytest.raises(ConfigError, match=r"training\.cuda_graphs: true needs a CUDA device"):
        open_with("parallel=zero1")
    with pytest.raises(ConfigError) as refused:
        open_with("parallel=zero2", "training.time_chunk=8")
    assert len(refused.value.problems) == 2
    assert any("parallel.zero_stage=2 reads gradients late" in problem for problem in refused.value.problems)
    assert any("training.time_chunk=8 keeps what blocks put out" in problem for problem in refused.value.problems)
