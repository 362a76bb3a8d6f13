"""Overrides are read with the schema in hand: texts stay as typed, and a mistake says what to type instead."""

import pytest
from omegaconf import OmegaConf

from conf import ConfigError, compose, to_dataclass
from conf.overrides import keys_of, other_name
from data_pipeline.preparing.config import PrepareConfig
from model.config import ModelOnlyConfig
from train.config import EvaluationSetConfig, RunConfig, WandbConfig
from train.validate import validate

BASE = ["name=x", "corpus.directory=y", "training.total_tokens=1_000_000"]


def composed(*overrides):
    return compose(RunConfig, "train", [*BASE, *overrides])


def problems(*overrides, base=BASE, check=None):
    with pytest.raises(ConfigError) as caught:
        compose(RunConfig, "train", [*base, *overrides], check)
    return caught.value.problems


@pytest.mark.parametrize(
    "text", ["12e4567", "1.10", "1e5", "1_000", "007", "0x10", "true", "False", "None", "inf", "-3"]
)
def test_a_text_that_looks_like_another_value_stays_as_typed(text, tmp_path):
    assert composed(f"name={text}").name == text
    assert composed(f'name="{text}"').name == text
    # And when the run's own file is read again.
    OmegaConf.save(OmegaConf.structured(composed(f"name={text}")), tmp_path / "config.yaml")
    assert to_dataclass(RunConfig, OmegaConf.load(tmp_path / "config.yaml")).name == text
    prepared = compose(PrepareConfig, "prepare", [f"output={text}", f"data.source={text}"])
    assert (prepared.output, prepared.data.source) == (text, text)


def test_texts_in_lists_mappings_and_sections_stay_as_typed():
    assert composed("logging.wandb.tags=[1.10, true, 1e5]").logging.wandb.tags == ["1.10", "true", "1e5"]
    assert composed("corpus.weights={1e5: 1, null: 2, 12: 3}").corpus.weights == {"1e5": 1, "null": 2, "12": 3}
    (phase,) = composed("corpus.phases=[{from_step: 0, weights: {1e5: 1}}]").corpus.phases
    assert phase.weights == {"1e5": 1} and phase.from_step == 0
    sets = composed("+evaluation.sets={1e5: {source: 1.10}}").evaluation.sets
    assert sets["1e5"] == EvaluationSetConfig(source="1.10")


@pytest.mark.parametrize("key", ["corpus.allow_changed_data", "logging.wandb.entity"])
@pytest.mark.parametrize("word", ["false", "true", "None", "none"])
def test_a_word_for_nothing_or_a_switch_is_refused_where_a_text_may_be_null(key, word):
    (found,) = problems(f"{key}={word}")
    assert found == (
        f"{key}: a text or null is wanted, not {word}; write {key}=null for none, or quote it: '{key}=\"{word}\"'"
    )
    section, _, name = key.rpartition(".")
    for value, expected in (("null", None), (f'"{word}"', word), ("12", "12")):
        assert OmegaConf.select(OmegaConf.structured(composed(f"{key}={value}")), f"{section}.{name}") == expected


def test_a_text_may_refer_to_a_number():
    config = composed("name=${seed}", "logging.wandb.project=run-${seed}", "logging.wandb.entity=${corpus.weights}")
    assert (config.name, config.logging.wandb.project, config.logging.wandb.entity) == ("0", "run-0", None)


def test_null_where_a_value_is_required_is_refused():
    found = problems("name=null", "seed=null", "training=null", "evaluation.sets=null", "logging.wandb.tags=[null]")
    keys = ["evaluation.sets", "logging.wandb.tags[0]", "name", "seed", "training"]
    assert sorted(found) == [f"{key}: a value is required, null is none" for key in keys]


@pytest.mark.parametrize("value", [1.1, 12, True])
def test_a_value_in_a_file_that_is_no_text_is_refused_not_rewritten(value):
    for tree, key in (({"entity": value}, "entity"), ({"project": value}, "project"), ({"tags": [value]}, "tags[0]")):
        with pytest.raises(ConfigError) as caught:
            to_dataclass(WandbConfig, tree)
        assert caught.value.problems == [f"{key}: a text is wanted, not {value!r}; quote it as it is meant"]


def test_a_whole_number_may_be_typed_as_one_times_a_power_of_ten():
    assert composed("training.total_tokens=1e9").training.total_tokens == 10**9
    assert composed("training.total_tokens=1.5e1").training.total_tokens == 15
    # More digits than a float has.
    assert composed("training.total_tokens=9007199254740993.0").training.total_tokens == 9007199254740993
    for value in ("1.5", "inf", "nan", "two", "1e3tokens"):
        (found,) = problems(f"training.total_tokens={value}")
        assert found.startswith("training.total_tokens: a whole number is wanted, such as 1000, 1_000 or 1e3 (")
    assert problems("optimizer.learning_rate=1e-3x") == [
        "optimizer.learning_rate: a number is wanted, such as 0.1 or 1e-3 ('1e-3x')"
    ]
    assert composed('seed="12"', 'optimizer.learning_rate="1e-3"').seed == 12


@pytest.mark.parametrize("value", ["null", "false", "3", "[none]", "{a: 1}", "", "none,validation"])
@pytest.mark.parametrize("group", ["evaluation", "model", "parallel"])
def test_a_group_that_is_set_to_no_file_of_it_is_refused(group, value):
    (found,) = problems(f"{group}={value}")
    assert found.startswith(f"{group}={value}: conf/{group}/ has no such file") and "; choose one of " in found


def test_a_mistyped_model_is_one_mistake_whatever_recipe_stands_in_its_place():
    overrides = ["model=tinymlstm", "training.total_steps=2", "training.total_tokens=null"]
    (found,) = problems(*overrides, check=lambda rest: validate(rest, 1))
    assert found.startswith(
        "model=tinymlstm: conf/model/ has no such file (did you mean 'tiny_mlstm'?); choose one of "
    )
    both = problems(*overrides, "training.global_batch_size=31", check=lambda rest: validate(rest, 2))
    assert [line.split(":")[0] for line in both] == ["model=tinymlstm", "training.global_batch_size"]


def test_what_is_missing_because_it_was_mistyped_is_one_mistake():
    assert problems("nmae=x", base=BASE[1:]) == ["nmae: no such key (did you mean 'name'?)"]


def test_a_group_is_neither_added_nor_removed():
    for override in ("~evaluation", "+evaluation=none", "++evaluation=none"):
        (found,) = problems(override)
        assert "a group is always chosen, without + and ~: evaluation=CHOICE" in found
    assert composed("experiment=null").name == "x"


def test_a_file_of_another_group_goes_into_a_section():
    live = composed("+data@corpus.live.data=text", "corpus.live.data.path=1e5", "+tokenizer@corpus.live.tokenizer=file")
    assert live.corpus.live.data.path == "1e5"
    (found,) = problems("+data@corpus.live.data=null")
    assert found.startswith("+data@corpus.live.data=null: conf/data/ has no such file; choose one of ")


def test_the_model_commands_refuse_a_group_that_is_null_too():
    with pytest.raises(ConfigError, match="model=null: conf/model/ has no such file"):
        compose(ModelOnlyConfig, "model_only", ["model=null"])


def test_a_section_set_to_a_value_is_refused():
    found = problems("corpus=5", "logging.wandb=false", "evaluation.sets.validation=null", "model.mlstm=3")
    assert sorted(found) == [
        f"{key}: a section with keys is expected, not {given}; set a key of it, such as {key}.{first}=VALUE"
        for key, given, first in (
            ("corpus", 5, "directory"),
            ("evaluation.sets.validation", "null", "split"),
            ("logging.wandb", False, "mode"),
            ("model.mlstm", 3, "n_heads"),
        )
    ]
    assert problems("name.x=3") == ["name.x: no such key (did you mean 'name'?)"]


def test_combinations_that_cannot_work_are_shown_together_with_mistyped_keys_and_values():
    overrides = ["lr=1", "optimizer.learning_rate=fast", "training.global_batch_size=31", "evaluation=null"]
    found = problems("recipe=none", *overrides, check=lambda rest: validate(rest, 1))
    assert [line.split(":")[0] for line in found] == [
        "evaluation=null",
        "lr",
        "optimizer.learning_rate",
        "training.global_batch_size",
    ]
    # Also without a name; and a mistyped key is one mistake, not that the right one is missing too.
    found = problems("training.total_step=5", "training.global_batch_size=31", base=[], check=lambda r: validate(r, 1))
    keys = ["training.total_step", "corpus.directory", "name", "training.global_batch_size"]
    assert [line.split(":")[0] for line in found] == keys
    assert problems("seed=${nowhere}", check=lambda r: validate(r, 1)) == ["Interpolation key 'nowhere' not found"]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "optimizer.learning_rate"),
        ("training.lr", "optimizer.learning_rate"),
        ("batch_size", "training.global_batch_size"),
        ("learning_rate", "optimizer.learning_rate"),
        ("total_tokens", "training.total_tokens"),
    ],
)
def test_the_name_that_other_trainers_use_leads_to_the_key(key, meant):
    assert problems(f"{key}=4") == [f"{key}: no such key (did you mean '{meant}'?)"]


@pytest.mark.parametrize(
    ("key", "meant"),
    [("evaluations.batch_size", "evaluation.batch_size"), ("corpus.worker", "corpus.workers"), ("namee", "name")],
)
def test_a_slip_of_the_fingers_is_no_name_of_another_trainer(key, meant):
    assert problems(f"{key}=4") == [f"{key}: no such key (did you mean '{meant}'?)"]


def test_every_name_of_other_trainers_leads_to_a_key_that_is_there():
    from conf.overrides import _OTHER_NAMES

    known = list(keys_of(RunConfig))
    assert {name: other_name(name, known) for name in _OTHER_NAMES} == _OTHER_NAMES


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        (["--lr", "1e-3"], "optimizer.learning_rate=1e-3"),
        (["--lr=1e-3"], "optimizer.learning_rate=1e-3"),
        (["--model", "tiny"], "model=tiny"),
        (["training.total_steps", "=", "4"], "training.total_steps=4"),
        (["training.total_steps=", "4"], "training.total_steps=4"),
        (["training.total_steps", "=4"], "training.total_steps=4"),
        (["training.total_steps = 4"], "training.total_steps=4"),
    ],
)
def test_dashes_and_spaces_are_answered_with_what_to_type(arguments, typed):
    given = " ".join(arguments)
    assert problems(*arguments) == [f"'{given}': settings are typed without dashes and spaces: {typed}"]


def test_a_setting_without_a_value_and_one_of_a_new_section_say_what_to_type():
    assert problems("seed") == ["'seed': no value is given; settings are typed key=value, such as seed=VALUE"]
    assert problems("evaluation.sets.books.source=b") == [
        "evaluation.sets.books.source: no such key yet; a plus adds it: +evaluation.sets.books.source=b"
    ]
    for argument in ("runs/first", "/my/text.jsonl"):
        (found,) = problems(argument)
        assert found == f"'{argument}': no key is given; settings are typed key=value, such as KEY={argument}"
    assert problems("resume")[0].endswith("such as resume_from=VALUE")
    assert problems("evaluation.sets.validaton.split=test") == [
        "evaluation.sets.validaton.split: no such key yet (did you mean 'evaluation.sets.validation.split'?); "
        "a plus adds it: +evaluation.sets.validaton.split=test"
    ]
    assert problems("+seed=3") == ["seed: is there already; leave out the + (+seed=3)"]
    both = composed("+evaluation.sets.books.split=test", "evaluation.sets.books.source=b").evaluation.sets
    assert both["books"].source == "b"
