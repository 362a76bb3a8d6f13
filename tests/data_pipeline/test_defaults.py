"""What conf/ gives for data and tokenizers is what the dataclasses default to, but for what a choice sets apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import OmegaConf

from conf import CONF_DIR, compose
from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.sources.config import DataConfig
from data_pipeline.tokenizing.config import TokenizerConfig

FILES = {"kind", "files", "exclude", "source"}
HELD_OUT = {"split.unit", "split.validation_fraction"}
# Keys in which a choice differs from the defaults: all others that it states must be equal to them.
SET_APART = {
    "data/standard_library": {"files", "exclude", "source", "split.validation_fraction", "tolerance.rejected_fraction"},
    "data/text": {*FILES, "tolerance.rejected_fraction"},
    "data/jsonl": FILES | HELD_OUT,
    "data/parquet": FILES | HELD_OUT,
    "data/records": FILES | HELD_OUT,
    "data/dclm": FILES | HELD_OUT,
    "data/slimpajama": {"kind", "files", "exclude", "source_field", "split.rule"},
    "data/datasets": {"kind", "source", *HELD_OUT},
    "tokenizer/sentencepiece_4k": set(),
    "tokenizer/sentencepiece_32k": {"vocab_size", "sample_bytes"},
    "tokenizer/file": {"kind"},
}


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_every_file_is_looked_at():
    files = {f"{group}/{path.stem}" for group in ("data", "tokenizer") for path in (CONF_DIR / group).glob("*.yaml")}
    assert files == set(SET_APART)


@pytest.mark.parametrize("name", SET_APART)
def test_a_choice_states_the_defaults_but_where_it_is_set_apart(name):
    schema = DataConfig if name.startswith("data/") else TokenizerConfig
    defaults = dict(leaves(dataclasses.asdict(schema())))
    stated = dict(leaves(OmegaConf.to_container(OmegaConf.load(CONF_DIR / f"{name}.yaml"))))
    assert {key for key, value in stated.items() if defaults[key] != value} == SET_APART[name]


def test_a_preparation_has_the_defaults_of_its_dataclass():
    composed = compose(PrepareConfig, "prepare", ["output=x"])
    assert composed == PrepareConfig(composed.data, composed.tokenizer, "x")
