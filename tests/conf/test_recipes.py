"""A model brings the optimizer, schedule and batch of its published runs, and every key of them can be set."""

import fnmatch

import pytest
from omegaconf import OmegaConf

from conf import CONF_DIR, ConfigError, compose
from model.presets import preset, preset_names
from tests.conf.test_defaults import differences
from tests.documented import quoted, table
from train.config import RunConfig
from train.plan import make_plan
from train.validate import validate

GIVEN = ["name=x", "corpus.directory=y", "training.total_steps=600000"]

# Model -> peak learning rate, epsilon, clipping, schedule, warm-up, cooldown, sequence length, samples of a step.
# Peaks, batches, warm-up and cooldown of arXiv 2510.02228: its public run table (the shorter runs of each size).
SCALING_LAWS = {
    "xlstm_80m": (3e-3, 128),
    "xlstm_160m": (3e-3, 128),
    "llama_160m": (3e-3, 128),
    **{
        f"{name}_{size}": (3e-3, 128)
        for name in ("hybrid", "parallel", "gla", "retnet", "mamba2", "gated_deltanet")
        for size in ("160m", "400m")
    },
    "xlstm_400m": (3e-3, 128),
    "llama_400m": (3e-3, 128),
    "xlstm_830m": (1e-3, 256),
    "xlstm_1b4": (8e-4, 256),
    "llama_1b4": (8e-4, 256),
    "xlstm_2b7": (7e-4, 512),
    "llama_7b": (5e-4, 512),
}
# arXiv 2405.04517, 15B tokens of SlimPajama; eps 1e-5, warm-up 750, cosine to 10 %, 256 x 2048. Clipping is ours.
NEURIPS = {"125m": 3e-3, "350m": 1e-3, "760m": 9e-4, "1b3": 9e-4}
# arXiv 2503.13427 with its public logs; the mixed one is not published and takes the same.
SEVEN_B = (4e-4, 1e-8, 0.5, "exponential", 3000, 7000, 8192, 512)
EXPECTED = {
    "xlstm_7b": SEVEN_B,
    "xlstm_7b_mixed": SEVEN_B,
    **{
        name: (peak, 1e-8, 0.5, "cosine", 750, 1000, 8192, batch)
        for name, (peak, batch) in SCALING_LAWS.items()
    },
    **{
        f"neurips_{size}_{ratio}": (peak, 1e-5, 1.0, "cosine", 750, None, 2048, 256)
        for size, peak in NEURIPS.items()
        for ratio in ("1_0", "7_1")
    },
    # Not published: the peak of the smallest of arXiv 2510.02228, and that of the demonstration.
    **dict.fromkeys(["tiny", "tiny_mlstm", "tiny_llama"], (3e-3, 1e-8, 0.5, "cosine", 0.01, None, 256, 32)),
    "tiny_neurips": (5e-3, 1e-8, 0.5, "cosine", 0.01, None, 256, 32),
    # arXiv 2405.04517, appendix B.1, where the peak is one of three.
    **{
        f"synthetic_{name}": (1e-3, 1e-8, 1.0, "cosine", 0.01, None, 40, 256)
        for name in ("1_0", "1_1", "0_1", "llama")
    },
}  # fmt: skip


def composed(*overrides):
    return compose(RunConfig, "train", [*GIVEN, *overrides])


def recipe_of(config):
    optimizer, schedule, training = config.optimizer, config.schedule, config.training
    return (
        optimizer.learning_rate,
        optimizer.eps,
        optimizer.gradient_clipping,
        schedule.kind,
        schedule.warmup,
        schedule.cooldown,
        training.sequence_length,
        training.global_batch_size,
    )


def test_every_model_has_its_recipe_here_and_in_a_file_of_its_name():
    assert preset_names() == sorted(EXPECTED)
    # Beside them: what several share, and no recipe at all.
    files = {path.stem for path in (CONF_DIR / "recipe").glob("*.yaml")}
    assert files - set(EXPECTED) == {"scaling_laws", "neurips", "synthetic", "none"} and set(EXPECTED) <= files


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_model_brings_the_recipe_of_its_source(name):
    config = composed(f"model={name}")
    assert recipe_of(config) == EXPECTED[name]
    second = 0.99 if name.startswith("synthetic") else 0.95
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ([0.9, second], 0.1)
    assert config.schedule.final_factor == 0.1
    assert config.schedule.decay == (495_000 if config.schedule.kind == "exponential" else None)
    # A pass on one GPU has at most 16,384 tokens, whatever the recipe.
    assert config.training.micro_batch_size * config.training.sequence_length <= 16_384


def test_the_table_of_the_documentation_is_this_one():
    rows = table("configuration.md", "models")
    found = {}
    for models, source, peak, schedule, batch in rows:
        names = [name for pattern in quoted(models) for name in fnmatch.filter(EXPECTED, pattern)]
        assert names and not set(names) & set(found), models
        found |= dict.fromkeys(names, (source, float(peak), schedule, batch))
    for name, (peak, _, _, kind, warmup, cooldown, length, samples) in EXPECTED.items():
        schedule = f"{kind}, warm-up {warmup}" + (f", cooldown {cooldown}" if cooldown else "")
        assert found[name][1:] == (peak, schedule, f"{length} x {samples}"), name
        files = [(CONF_DIR / "recipe" / f"{file}.yaml").read_text() for file in _files_of(name)]
        assert any(found[name][0].replace("our own", "Not published") in text for text in files), name


def _files_of(name):
    """The recipe and those that it starts from."""
    below = OmegaConf.load(CONF_DIR / "recipe" / f"{name}.yaml").get("defaults", [])
    return [name, *(file for other in below if other != "_self_" for file in _files_of(other))]


def test_a_chosen_file_replaces_that_part_of_the_recipe_whole():
    config = composed("model=xlstm_830m", "optimizer=adamw_neurips", "schedule=wsd")
    assert recipe_of(config) == (3e-3, 1e-5, 1.0, "wsd", 0.01, None, 8192, 256)
    for group, section in {"optimizer": config.optimizer, "schedule": config.schedule}.items():
        for path in (CONF_DIR / group).glob("*.yaml"):
            assert set(OmegaConf.load(path)) == set(vars(section)), f"{path.name} would leave values of the recipe"


def test_each_key_of_a_recipe_can_be_set():
    set_here = {
        "optimizer.learning_rate": 1e-4,
        "optimizer.eps": 1e-6,
        "schedule.warmup": 10,
        "schedule.cooldown": 20,
        "training.sequence_length": 512,
        "training.global_batch_size": 16,
    }
    config = composed("model=xlstm_1b4", *(f"{key}={value}" for key, value in set_here.items()))
    assert recipe_of(config) == (1e-4, 1e-6, 0.5, "cosine", 10, 20, 512, 16)


def test_another_recipe_or_none_can_be_chosen():
    assert recipe_of(composed("model=xlstm_160m", "recipe=neurips")) == EXPECTED["neurips_125m_1_0"]
    assert list(differences(composed("model=xlstm_160m", "recipe=none").optimizer, RunConfig().optimizer)) == []
    with pytest.raises(ConfigError, match="recipe=nothing: conf/recipe/ has no such file; choose one of .*xlstm_7b"):
        composed("recipe=nothing")


def test_an_experiment_that_chooses_the_model_gets_its_recipe_below_its_own_values():
    config = compose(RunConfig, "train", ["experiment=demo"])
    assert recipe_of(config) == (5e-3, 1e-8, 0.5, "wsd", 0.01, None, 256, 8)
    other = compose(RunConfig, "train", ["experiment=demo", "model=neurips_125m_1_0"])
    assert recipe_of(other) == (5e-3, 1e-5, 1.0, "wsd", 0.01, None, 256, 8)


def test_the_plan_says_what_the_recipe_chose():
    plan = make_plan(composed("model=xlstm_1b4"), world_size=8, device="NVIDIA H200")
    lines = plan.describe().splitlines()
    assert (
        "optimizer  AdamW, peak learning rate 0.0008, betas 0.9 and 0.95, eps 1e-08, weight decay 0.1, gradient norm "
        "clipped at 0.5"
    ) in lines
    assert "schedule   cosine, warm-up 750 steps, cooldown to 0 1,000 steps, falls to 0.1 of the peak" in lines
    assert any("256 samples x 8192 tokens" in line for line in lines)
    assert plan.as_dict()["optimizer"]["learning_rate"] == 8e-4 and plan.as_dict()["schedule"]["warmup"] == 750


def test_a_run_too_short_for_the_published_schedule_is_told_what_to_choose():
    short = compose(RunConfig, "train", [*GIVEN[:2], "training.total_steps=1000"])
    (problem,) = validate(short, world_size=1)
    assert "warmup 750 + cooldown 1000 = 1750 steps do not fit into the run's 1000 steps" in problem
    assert problem.endswith("such as schedule=cosine")
    assert validate(compose(RunConfig, "train", [*GIVEN[:2], "training.total_steps=1000", "schedule=cosine"]), 1) == []


def test_on_top_of_another_run_a_file_replaces_its_section_and_a_recipe_is_refused():
    base = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(composed("model=xlstm_1b4"))))
    found = compose(RunConfig, "train", ["name=y", "schedule=wsd"], base=base)
    assert recipe_of(found) == (8e-4, 1e-8, 0.5, "wsd", 0.01, None, 8192, 256)
    with pytest.raises(ConfigError, match="recipe=xlstm_7b: sets values in many sections, which are given already"):
        compose(RunConfig, "train", ["name=y", "recipe=xlstm_7b"], base=base)


# Experiment -> steps, samples of a step, tokens of a sample, peak learning rate, decay of the schedule.
# arXiv 2503.13427; the run table of arXiv 2510.02228; arXiv 2405.04517, whose 15B-token runs end before their schedule.
EXPERIMENTS = {
    "xlstm_7b": (550_000, 512, 8192, 4e-4, 495_000),
    "xlstm_7b_mixed": (550_000, 512, 8192, 4e-4, 495_000),
    "xlstm_1b4": (16_000, 256, 8192, 8e-4, None),
    "xlstm_400m": (10_000, 128, 8192, 3e-3, None),
    "xlstm_160m": (3_500, 128, 8192, 3e-3, None),
    "neurips_125m_15b": (28_170, 256, 2048, 3e-3, 29_250),
    "neurips_350m_15b": (28_170, 256, 2048, 1e-3, 29_250),
    "neurips_760m_15b": (28_170, 256, 2048, 9e-4, 29_250),
    "neurips_1b3_15b": (28_170, 256, 2048, 9e-4, 29_250),
    "neurips_125m_300b": (600_000, 256, 2048, 1.5e-3, None),
    "neurips_350m_300b": (600_000, 256, 2048, 7.5e-4, None),
    "neurips_760m_300b": (600_000, 256, 2048, 6.25e-4, None),
    "neurips_1b3_300b": (300_000, 512, 2048, 5e-4, None),
}


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_an_experiment_is_the_run_of_its_paper(name):
    config = compose(RunConfig, "train", [f"experiment={name}"])
    training = config.training
    found = (training.total_steps, training.global_batch_size, training.sequence_length)
    assert (*found, config.optimizer.learning_rate, config.schedule.decay) == EXPERIMENTS[name]
    size = name.removesuffix("_15b").removesuffix("_300b")
    assert config.name == name and config.model == preset(name if size == name else f"{size}_7_1")


# Of one task by itself, another one's name or size in its place; arXiv 2405.04517, appendices B.1 and B.2.
SYNTHETIC = {
    "formal": (100_000, 256, 40, "answer"),
    "parity": (1000, 128, 40, "every"),
    "mqar": (12_500, 512, 64, "answer"),
}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_an_experiment_of_a_task_has_its_protocol(name):
    config = compose(RunConfig, "train", [f"experiment={name}"])
    training = config.training
    found = (training.total_steps, training.global_batch_size, training.sequence_length)
    assert (*found, config.corpus.task.scored) == SYNTHETIC[name] and config.evaluation.sets == {}


def test_every_experiment_of_a_paper_is_one_of_these():
    files = {path.stem for path in (CONF_DIR / "experiment").glob("*.yaml")}
    assert files == {*EXPERIMENTS, "demo", *SYNTHETIC}


def test_the_second_phase_of_the_7b_has_the_shares_of_its_paper():
    corpus = compose(RunConfig, "train", ["experiment=xlstm_7b"]).corpus
    (phase,) = corpus.phases
    assert phase.from_step == 500_000 and sum(phase.weights.values()) == pytest.approx(1)
    assert phase.weights == {
        "dclm": 0.40,
        "fineweb_edu": 0.15,
        "cosmopedia": 0.10,
        "proof_pile_2": 0.15,
        "the_stack": 0.15,
        "instructions": 0.05,
    }
    # Of sources that come later the first phase takes nothing.
    assert corpus.weights == {**dict.fromkeys(phase.weights, 0.0), "dclm": 1.0}
