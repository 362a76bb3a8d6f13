"""From YAML and overrides to dataclasses: every mistake is found, all at once, with what to do about it."""

import os
from dataclasses import dataclass, field

import pytest
from omegaconf import OmegaConf

from conf import CONF_DIR, ConfigError, compose, to_dataclass
from model.config import MLSTMConfig
from train.config import EvaluationSetConfig, RunConfig
from train.plan import make_plan
from train.validate import validate

BASE = ["name=x", "corpus.directory=y", "training.total_tokens=1_000_000"]


def problems(overrides):
    with pytest.raises(ConfigError) as caught:
        compose(RunConfig, "train", overrides)
    return caught.value.problems


def test_sections_become_the_frozen_dataclasses():
    config = compose(RunConfig, "train", [*BASE, "model=xlstm_7b"])
    assert isinstance(config.model.mlstm, MLSTMConfig)
    assert isinstance(config.evaluation.sets["validation"], EvaluationSetConfig)
    assert config.training.total_tokens == 1_000_000
    with pytest.raises(AttributeError):
        config.model.d_model = 3


def test_all_mistakes_are_reported_at_once_with_the_nearest_key():
    found = problems([*BASE, "training.total_step=5", "model=nonsense", "parallel.zero_stag=1", "a==b"])
    assert len(found) == 4
    text = "\n".join(found)
    assert "training.total_step: no such key (did you mean 'training.total_steps'?)" in text
    assert "model=nonsense: conf/model/ has no such file; choose one of" in text and "xlstm_7b" in text
    assert "parallel.zero_stag: no such key (did you mean 'parallel.zero_stage'?)" in text
    assert "'a==b'" in text


@pytest.mark.parametrize("value", ["/data/ü", "/data/a,b", "/data/a=b", "/data/a (1)", "~/data"])
def test_a_path_that_needs_quotes_is_shown_with_them(value):
    found = problems([*BASE, f"corpus.directory={value}"])
    hint = f'corpus.directory="{value}"'
    assert len(found) == 1 and found[0].endswith(f"; if the value is one text, quote it: '{hint}'")
    assert compose(RunConfig, "train", [*BASE, hint]).corpus.directory == os.path.expanduser(value)
    assert "quote" not in problems([*BASE, "corpus.phases=[{from_step: 1"])[0]


def test_missing_and_mistyped_values_are_reported_together():
    found = problems(["training.micro_batch_size=many", "optimizer.learning_rate=fast"])
    assert sorted(line.split(":")[0] for line in found) == [
        "corpus.directory",
        "name",
        "optimizer.learning_rate",
        "training.micro_batch_size",
    ]
    assert any("'many'" in line for line in found)
    assert "corpus.directory: a value is required; set corpus.directory=VALUE" in found


def test_keys_below_an_added_section_are_checked_too():
    (found,) = problems([*BASE, "+evaluation.sets.books.splt=test"])
    assert found == "evaluation.sets.books.splt: no such key (did you mean 'split'?)"
    config = compose(RunConfig, "train", [*BASE, "+evaluation.sets.books.split=test"])
    assert config.evaluation.sets["books"].split == "test"


def test_a_broken_interpolation_is_reported():
    assert any("nowhere" in line for line in problems([*BASE, "seed=${nowhere}"]))


@dataclass(frozen=True)
class Leaf:
    size: int = 1


@dataclass(frozen=True)
class Tree:
    leaves: list[Leaf] = field(default_factory=list)
    named: dict[str, Leaf] = field(default_factory=dict)
    maybe: Leaf | None = None


def test_lists_mappings_and_optional_sections():
    tree = to_dataclass(Tree, {"leaves": [{"size": 2}, {}], "named": {"a": {"size": 3}}, "maybe": None})
    assert tree == Tree(leaves=[Leaf(2), Leaf(1)], named={"a": Leaf(3)}, maybe=None)
    with pytest.raises(ConfigError) as caught:
        to_dataclass(Tree, {"leaves": [{"siez": 2}], "named": {"a": {"size": "x"}}, "maybe": 3})
    text = str(caught.value)
    assert "leaves[0].siez: no such key (did you mean 'size'?)" in text
    assert "named.a.size" in text
    assert "maybe: a section with keys is expected" in text


GROUPS = ["model", "optimizer", "schedule", "parallel", "precision", "checkpoint", "evaluation", "logging", "alerts"]
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF_DIR / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_composes_validates_and_plans(group, choice):
    overrides = [*BASE[:2], "training.total_steps=600000", f"{group}={choice}"]
    config = compose(RunConfig, "train", overrides)
    assert validate(config, world_size=8) == []
    plan = make_plan(config, world_size=8, device="NVIDIA H200")
    assert plan.parameters > 0 and plan.predicted_seconds > 0


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml")))
def test_every_experiment_composes_validates_and_plans_on_two_processes(experiment):
    config = compose(RunConfig, "train", [f"experiment={experiment}"])
    assert validate(config, world_size=2) == []
    assert make_plan(config, world_size=2).tokens_per_step == config.tokens_per_step


def test_every_yaml_file_belongs_to_a_tested_group():
    tested = {*GROUPS, "experiment"}
    others = {path.parent.name for path in CONF_DIR.rglob("*.yaml")} - tested - {"conf"}
    # A recipe is composed with its model; the groups of `prepare` in tests/data_pipeline, those of `launch` in
    # tests/launch, suites in tests/train/evaluate.
    assert others == {"recipe", "data", "tokenizer", "launch", "sweep", "suite", "reproduce"}
    for path in CONF_DIR.rglob("*.yaml"):
        OmegaConf.load(path)
