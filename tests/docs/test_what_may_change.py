"""The table of docs/guides/resume.md against what a run refuses when its folder has another configuration."""

import dataclasses
import functools
import re

import pytest
from omegaconf import OmegaConf

from tests.docs.configuration_keys import run_keys, some_run
from tests.documented import quoted, table
from train.changes import changes_of_run, refused_changes_of_data
from train.length import begin
from train.run_directory import RunDirectory

REFUSED, REASON, FREE, TAKEN = "refused", "needs a reason", "free", "taken as it is"


@functools.cache
def rows():
    """Key, or `section.*`, -> what the table says of another value."""
    return {key: row[1] for row in table("guides/resume.md", "keys") for key in quoted(row[0])}


def said_of(key):
    """What the table says of `key`: the row that names it, or the closest section above it."""
    documented = rows()
    # The entries of a list go with the list.
    parts = key.replace("[I]", "").split(".")
    for length in range(len(parts), 0, -1):
        for name in (".".join(parts[:length]), f"{'.'.join(parts[:length])}.*"):
            if name in documented:
                return documented[name]
    raise AssertionError(f"{key} stands in no row of the table")


def test_the_table_has_these_answers_and_names_keys_that_exist():
    assert set(rows().values()) == {REFUSED, REASON, FREE, TAKEN}
    for name in rows():
        wanted = name.removesuffix(".*")
        assert any(key == wanted or key.startswith(f"{wanted}.") for key in run_keys()), name


def changed(config, key):
    """`config` with another value of `key`; None where the key's section is left out or not of fixed names."""
    if re.search(r"\.NAME|\[I\]", key):
        return None
    holders, parts = [config], key.split(".")
    for part in parts[:-1]:
        holders.append(getattr(holders[-1], part))
        if holders[-1] is None:
            return None
    old = getattr(holders[-1], parts[-1])
    if isinstance(old, dict) or dataclasses.is_dataclass(old):
        return None
    value = {int: 7, float: 0.125, bool: not old, str: "another", list: [1], type(None): 5}[type(old)]
    for holder, part in zip(reversed(holders), reversed(parts), strict=True):
        value = dataclasses.replace(holder, **{part: value})
    return value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = RunDirectory(tmp_path_factory.mktemp("runs") / "NAME")
    directory.path.mkdir()
    # Of a run that has begun.
    (directory.checkpoints / "step-00000001").mkdir(parents=True)
    (directory.checkpoints / "step-00000001" / "complete.json").touch()
    directory.config.write_text(OmegaConf.to_yaml(OmegaConf.structured(some_run())), encoding="utf-8")
    return directory


def test_every_key_does_what_the_table_says(folder):
    assert changes_of_run(some_run(), folder) == []
    identity = dict.fromkeys(("corpus", "tokenizer", "split", "mixture", "sequence_length", "packing"), "then")
    state = dataclasses.replace(begin(some_run(), identity | {"window_shards": 1}), step=1)
    tried = {}
    for key in run_keys():
        if any(other.startswith((f"{key}.", f"{key}[")) for other in run_keys()):
            continue
        said = said_of(key)
        config = changed(some_run(), key)
        if config is None:
            continue
        tried[key] = said
        problems = changes_of_run(config, folder)
        assert bool(problems) == (said == REFUSED), f"{key}: {said}, but {problems}"
        # As if everything that makes up the data were another.
        then = state
        if key.startswith("training.carry_"):
            # Another number of samples in a step is another order where rows go on, and only there.
            then = dataclasses.replace(state, data_identity=state.data_identity | {"lanes": "then"})
        problems = refused_changes_of_data(config, then, {})
        if key == "corpus.allow_changed_data":
            assert problems == []
            continue
        named = [problem.split(":")[0] for problem in problems]
        assert (key in named) == (said == REASON), f"{key}: {said}, but {problems}"
        if said == REASON:
            allowed = dataclasses.replace(config.corpus, allow_changed_data="a test")
            assert refused_changes_of_data(dataclasses.replace(config, corpus=allowed), state, {}) == [], key
    assert len(tried) > 60 and set(tried.values()) == {REFUSED, REASON, FREE, TAKEN}
