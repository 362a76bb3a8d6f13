"""The kind that docs/adding_a_layer.md adds by one file goes through everything that the built-in ones go through."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from model import layers, load
from model.config import MLSTMConfig, ModelConfig, validate_model
from model.initialisation import initialise
from model.language_model import LanguageModel
from model.layers import layer_kind, sequence_problems
from model.locate import locate
from model.parameters import parameter_shapes
from tests.runs import PATIENCE, ROOT, environment, run_train

PLUGIN = "docs.examples.leaky_average"
CONFIG = ModelConfig(
    d_model=32,
    vocab_size=61,
    n_blocks=2,
    ffn_dim=48,
    mlstm=MLSTMConfig(n_heads=2),
    other_at={"leaky_average": [1]},
    layers={"leaky_average": {"width": 3}},
    plugins=[PLUGIN],
)
MODEL_OVERRIDES = [
    f"model.plugins=[{PLUGIN}]",
    "+model.other_at.leaky_average=[0]",
    "+model.layers.leaky_average.width=3",
    "model.slstm_at=[]",
    "model.slstm=null",
]


@pytest.fixture(scope="module", autouse=True)
def _only_here():
    """The kind is gone when other tests of the process run: some list the registered kinds."""
    before = dict(layers._registered)
    yield
    layers._registered.clear()
    layers._registered.update(before)
    sys.modules.pop(PLUGIN, None)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "model", *arguments]
    return subprocess.run(line, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def plugin_run(small_corpus, tmp_path_factory):
    """A run of 5 steps by the real command line, whose first block is the plugin's."""
    from tests.runs import TINY_RUN

    root = tmp_path_factory.mktemp("plugin")
    tiny = [setting for setting in TINY_RUN if not setting.startswith(("model.slstm", "checkpoint.interval"))]
    names = ["name=run", f"run_root={root}", f"corpus.directory={small_corpus}"]
    done = run_train([*names, *tiny, *MODEL_OVERRIDES, "training.total_steps=5", "checkpoint.interval=2"])
    assert done.returncode == 0, done.stderr
    return root / "run"


@pytest.mark.slow
def test_it_is_trained_checkpointed_and_loaded(plugin_run):
    lines = [json.loads(line) for line in (plugin_run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == [1, 2, 3, 4, 5] and losses[5] < losses[1]
    assert OmegaConf.load(plugin_run / "config.yaml").model.layers.leaky_average.width == 3
    model = load(plugin_run)
    assert model.config.plugins == [PLUGIN] and model.blocks[0].kind == "leaky_average"
    start = LanguageModel(model.config)
    initialise(start, seed=0)
    trained = model.blocks[0].mixer.decay
    assert trained.shape == (3,) and not torch.equal(trained, start.blocks[0].mixer.decay)


@pytest.mark.slow
def test_it_resumes_and_refuses_other_settings(plugin_run):
    stored = OmegaConf.load(plugin_run / "config.yaml")
    overrides = [f"{key}={stored[key]}" for key in ("name", "run_root")]
    from tests.runs import TINY_RUN

    tiny = [setting for setting in TINY_RUN if not setting.startswith(("model.slstm", "checkpoint.interval"))]
    others = [*overrides, f"corpus.directory={stored.corpus.directory}", *tiny, "checkpoint.interval=2"]
    changed = [setting.replace("width=3", "width=2") for setting in MODEL_OVERRIDES]
    refused = run_train([*others, *changed, "training.total_steps=5"])
    assert refused.returncode == 2 and "was started with another value" in refused.stderr, refused.stderr
    resumed = run_train([*others, *MODEL_OVERRIDES, "training.total_steps=5"])
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.slow
def test_it_is_accounted_generated_from_and_refused_by_the_export(plugin_run, tmp_path):
    described = command("describe", "model=tiny", *MODEL_OVERRIDES, "--json")
    assert described.returncode == 0, described.stderr
    description = json.loads(described.stdout)
    assert description["model"]["blocks"] == {"mlstm": 3, "leaky_average": 1}
    assert description["parameters"]["groups"]["averages"] == 2 * 3 * 192
    assert description["parameters"]["groups"]["decays"] == 3
    assert list(description["parameters"]["groups"])[-1] == "head"
    assert description["training_flops"]["forward_per_sequence"]["leaky average"] == 4 * 3 * 8192
    generated = command("generate", f"checkpoint={plugin_run}", "prompt=a", "max_new_tokens=5")
    assert generated.returncode == 0 and generated.stdout.startswith("a"), generated.stderr
    refused = command("export", f"checkpoint={plugin_run}", f"output={tmp_path / 'out'}")
    assert refused.returncode == 2
    assert "leaky_average blocks at [0]: all blocks are mLSTM blocks there" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_its_parameters_are_those_of_the_table():
    assert validate_model(CONFIG) == []
    model = LanguageModel(CONFIG)
    assert list(parameter_shapes(CONFIG).items()) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    initialise(model, seed=0)
    assert torch.equal(model.blocks[1].mixer.decay, torch.full((3,), 2.0))


def test_its_state_is_carried(make_model, make_batch):
    model = make_model(CONFIG)
    batch = make_batch()
    tokens, starts = batch["tokens"], batch["document_start"]
    whole = model(tokens, document_start=starts).logits
    first = model(tokens[:, :17], document_start=starts[:, :17], return_state=True)
    rest = model(tokens[:, 17:], document_start=starts[:, 17:], state=first.state.for_decoding())
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"layers": {"leaky_average": {"widht": 3}}},
            ["model.layers.leaky_average.widht: no such key (did you mean 'width'?)"],
        ),
        (
            {"layers": {"leaky_average": {"width": "wide", "hight": 2}}},
            [
                "model.layers.leaky_average.width: Value 'wide' of type 'str' could not be converted to Integer",
                "model.layers.leaky_average.hight: no such key",
            ],
        ),
        (
            {"layers": {"leaky_average": {"width": 0}}},
            ["model.layers.leaky_average.width: is 0; it must be a positive number"],
        ),
        ({"layers": {"leaky_average": 3}}, ["model.layers.leaky_average: a section with keys is expected, not 3"]),
        (
            {"other_at": {}},
            ["model.layers.leaky_average: is set, but no block of this model is of such a plugin's kind; remove it"],
        ),
        (
            {"other_at": {"leaky_average": [2]}},
            ["model.other_at.leaky_average: [2] name no block; positions run from 0 to"],
        ),
        (
            {"other_at": {"leaky_average": [0], "leaky": [1]}},
            ["model.other_at.leaky: no such kind of layer; known are mlstm, slstm, attention"],
        ),
        (
            {"other_at": {"leaky_average": [0], "slstm": [1]}},
            ["model.other_at.slstm: these positions have a list of their own; name them in slstm_at"],
        ),
        (
            {"slstm_at": [1]},
            ["model.other_at.leaky_average: [1] are also in slstm_at; a block has one kind, remove them from one list"],
        ),
        (
            {"family": "neurips"},
            [
                "model.other_at.leaky_average: leaky_average blocks do not fit in the blocks of the other family; set "
                "family=xlstm_7b or"
            ],
        ),
        (
            {"plugins": [PLUGIN, "no_such.module"]},
            ["model.plugins: 'no_such.module' cannot be imported (ModuleNotFoundError: No module named 'no_such')"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_with_its_key(change, expected):
    problems = validate_model(dataclasses.replace(CONFIG, **change))
    assert len(problems) == len(expected)
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start), problems


def test_settings_that_are_not_given_have_the_defaults_of_the_kind():
    config = dataclasses.replace(CONFIG, layers={})
    assert validate_model(config) == []
    assert layer_kind(config, "leaky_average").settings(config).width == 64


def test_a_kind_that_does_not_share_sequences_is_refused_there():
    assert sequence_problems(CONFIG, 1) == []
    assert sequence_problems(CONFIG, 2) == ["leaky_average blocks cannot share a sequence among 2 ranks; use one"]


def test_a_plugin_that_is_missing_later_is_named():
    config = dataclasses.replace(CONFIG, plugins=["no_such.module"])
    with pytest.raises(ValueError, match=r"model.plugins: 'no_such.module' cannot be imported \(ModuleNotFoundError"):
        LanguageModel(config)


def test_a_checkpoint_names_its_plugin(plugin_run):
    values = json.loads((locate(plugin_run).weights / "model.json").read_text())["model"]
    assert values["plugins"] == [PLUGIN] and values["layers"] == {"leaky_average": {"width": 3}}
