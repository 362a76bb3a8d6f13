"""What a run needs of an earlier start's folder: the same run, also where another version of this program began it."""

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf import ConfigError, compose
from train.config import RunConfig
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
