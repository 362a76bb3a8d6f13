"""Commands of the pages: those that need nothing special are run; of the others the syntax and the keys are checked."""

import dataclasses
import functools
import importlib.util
import re
import shlex
import subprocess
import tomllib

import pytest

from conf import compose
from data_pipeline.preparing.config import PrepareConfig
from launch.calibrate import CalibrateConfig, validate_calibration
from launch.job import read_job
from launch.planner.command import read_arguments
from launch.reproduce.plan import read_reproduction
from model.config import ModelOnlyConfig, validate_model
from tests.docs.conftest import copied_tree
from tests.docs.documentation import (
    NEEDS,
    PAGES,
    Shell,
    blocks,
    commands,
    help_commands,
    inline_commands,
    name,
    python_blocks,
    run_python,
)
from tests.runs import ROOT
from train.config import RunConfig
from train.evaluate.suites.suites import schema_of, suite_named
from train.validate import validate

ALL = [block for page in PAGES for block in blocks(page)]
README = ROOT / "README.md"
# Chains of pages that processes of pytest can share. The README's commands come first: they make corpora/first and
# runs/first, which most pages use. Others need its corpus alone: those that make runs of their own, and what goes on
# from steps of a run.
WITH_COMMANDS = [page for page in PAGES if any(block.needs is None for block in blocks(page))]
OF_THE_CORPUS = {
    "checkpoints": ["docs/guides/resume.md", "docs/guides/weights.md"],
    "corpora": ["docs/adding_a_layer.md", "docs/guides/cluster.md", "docs/guides/your_corpus.md", "docs/planning.md"],
}
CHAINS = {chain: [ROOT / page for page in pages] for chain, pages in OF_THE_CORPUS.items()}
CHAINS["runs"] = [page for page in PAGES if not any(page in pages for pages in CHAINS.values())]
OUR_MODULES = {"train", "train.report", "train.evaluate", "train.checkpoint", "launch", "data_pipeline", "model"}
MODULES = OUR_MODULES | {"pip", "pytest", "torch.distributed.run"}
# What the pages' commands leave behind, by page.
LEFT = {
    "README.md": ["corpora/first/manifest.json", "runs/first/report.png", "exported/config.json"],
    "docs/guides/your_corpus.md": ["corpora/both/manifest.json", "corpora/only_pages/manifest.json", "runs/mixed"],
    "docs/model.md": ["once.safetensors", "weights/first/model.json", "exported_plugin/config.json"],
    "docs/guides/downstream.md": ["runs/first/evaluations.jsonl", "runs/first/evaluations/length/perplexity.png"],
    "docs/guides/compare.md": ["comparison.html", "comparison.png"],
    "docs/guides/evaluation.md": ["runs/bits/evaluations.jsonl", "runs/first/evaluations.jsonl"],
    "docs/scaling_laws.md": ["scaling/runs.csv", "scaling/fit/scaling.html", "scaling/fit/fit.json"],
    "docs/guides/weights.md": [
        "runs/tuned/checkpoints/step-00000002",
        "averaged/average.json",
        "whole/model.safetensors",
    ],
    "docs/guides/resume.md": ["runs/first/checkpoints/step-00000008", "runs/annealed/checkpoints/step-00000010"],
}


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["runs", *OF_THE_CORPUS])
def test_commands_of_the_pages_work_in_their_order(chain, tmp_path):
    checkout = copied_tree(tmp_path)
    _score_few_tokens(checkout)
    shell, printed = Shell(checkout), {}
    if chain in OF_THE_CORPUS:
        shell.run(_command_that_makes_the_corpus())
    for page in CHAINS[chain]:
        # Not what `make` does: tests/docs/test_readme.py.
        runnable = [block for block in blocks(page) if block.needs is None and not block.text.startswith("make ")]
        printed[page] = "".join(shell.run(block) for block in runnable)
        for path in LEFT.get(name(page), []):
            assert (checkout / path).exists(), path
    # The Python of the pages goes on with what the commands have made.
    pieces = {
        page: run_python(python_blocks(page), checkout, checkout) for page in CHAINS[chain] if python_blocks(page)
    }
    if chain == "runs":
        assert "6,865,424,896 parameters in 483 tensors" in printed[README]
        assert "torch.Size([2, 16, 4096])" in pieces[ROOT / "docs" / "python.md"]
        assert (checkout / "runs" / "from_python" / "checkpoints" / "step-00000002").is_dir()
        assert (checkout / "corpora" / "from_python" / "manifest.json").is_file()


def _score_few_tokens(checkout):
    """Runs score the first tokens of what is held out where a command leaves that open, not all: most of their time."""
    for path in (checkout / "conf" / "evaluation" / f"{choice}.yaml" for choice in ("validation", "by_source")):
        text = path.read_text(encoding="utf-8")
        assert text.count("max_tokens: null") == 1
        path.write_text(text.replace("max_tokens: null", "max_tokens: 2048"), encoding="utf-8")


def _command_that_makes_the_corpus():
    (block,) = [block for block in blocks(README) if "output=corpora/first" in block.text]
    (line,) = [line for line in block.text.splitlines() if line.endswith("output=corpora/first")]
    return dataclasses.replace(block, text=line)


def test_the_pages_with_commands_are_found():
    assert sorted(page for pages in CHAINS.values() for page in pages) == sorted(PAGES)
    assert {name(page) for page in WITH_COMMANDS} >= LEFT.keys() | {"docs/guides/first_run.md", "docs/guides/wandb.md"}
    for page in PAGES:
        fences = re.findall(r"^```(\S.*)$", page.read_text(encoding="utf-8"), flags=re.M)
        shell = [fence for fence in fences if fence.split()[0] in ("sh", "bash", "shell", "console")]
        assert len(shell) == len(blocks(page)), f"{name(page)}: {shell}"


@pytest.mark.parametrize("block", [block for block in ALL if block.needs is not None], ids=str)
def test_commands_that_are_not_run_can_be_typed(block):
    assert block.needs in NEEDS
    checked = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    for words in commands(block.text):
        _check_words(words)


@pytest.mark.parametrize("page", [page for page in PAGES if inline_commands(page)], ids=name)
def test_commands_in_sentences_and_tables_can_be_typed(page):
    for text in inline_commands(page):
        _check_words(shlex.split(text))


@pytest.mark.parametrize(("package", "text"), help_commands())
def test_examples_in_helps_can_be_typed(package, text):
    assert _check_words(shlex.split(text)) == package


def test_no_command_is_hidden_from_these_tests():
    """A command stands in a block of its own kind or in a sentence, where it is found and checked."""
    assert {"model", "data_pipeline"} <= {package for package, _ in help_commands()}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^( *)```(.*)\n((?:.*\n)*?)^ *```$", text, flags=re.M)
        assert 2 * len(fences) == len(re.findall(r"^ *```", text, flags=re.M)), name(page)
        for indent, kind, content in fences:
            assert not indent and kind.split(" ")[0] in ("sh", "python", "text", "yaml", "json"), (
                f"{name(page)}: {kind}"
            )
            assert kind.startswith("sh") or not re.search(r"^\W*(\S*python\d? -m|make|torchrun) ", content, flags=re.M)


def test_commands_of_one_run_agree_with_each_other():
    """Wherever a reader begins: a run that a page began goes on with the command of another page."""
    begun: dict[str, tuple[object, ...]] = {}
    for block in (block for block in ALL if "python -c '" not in block.text):
        for words in commands(block.text):
            given = _train_arguments(words)
            # What another run's configuration gives is not known here.
            if given is None or "--config" in words:
                continue
            config = _composed(*given)
            identity = (config.model, config.seed, config.training.sequence_length, config.corpus.directory)
            assert begun.setdefault(config.name, identity) == identity, f"{block}: {config.name}"
    assert {"first", "big", "annealed"} <= begun.keys()


@functools.cache
def _composed(*overrides):
    """The run that a command describes; pages show the same commands."""
    return compose(RunConfig, "train", list(overrides))


def _check_words(words):
    """Check that a command can be typed as it stands; returns our module that it starts, if any."""
    if words[:1] == ["make"]:
        assert words[1] in re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M), words
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[([\w-]+)\]", words[2])) <= extras.keys(), words
    if "-m" not in words or words[words.index("-m") + 1].isnumeric():
        return None
    # torchrun and python both take `-m module`; the last one names ours.
    position = len(words) - 1 - words[::-1].index("-m")
    _check(words[position + 1], words[position + 2 :])
    return words[position + 1]


def _train_arguments(words):
    """The settings of a command that trains; None for another, for one that only names the program, and for one whose
    settings another run gives."""
    if "--config" in words:
        return None
    for start in (["-m", "train"], ["-m", "launch", "local"]):
        for position in range(len(words)):
            if words[position : position + len(start)] == start:
                return [word for word in words[position + len(start) :] if "=" in word and word[0] != "-"] or None
    return None


def _check(module, arguments):
    top = module.split(".")[0]
    assert module in MODULES or (top == "benchmarks" and importlib.util.find_spec(module)), module
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    if module in OUR_MODULES or top == "benchmarks":
        path = ROOT / module.replace(".", "/")
        files = [path.with_suffix(".py"), *path.rglob("*.py")]
        source = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
        known = [argument for argument in arguments if re.fullmatch(r"--[\w-]+(=.*)?", argument)]
        known += arguments[:1] if module in ("launch", "data_pipeline", "model") else []
        assert all(f'"{argument.split("=")[0]}"' in source for argument in known), (module, known)
    if module == "train" or (module == "launch" and arguments[0] == "local"):
        # Three dots stand for the rest of a command.
        if overrides and "..." not in arguments:
            # With --config, a run gives these.
            given = ["corpus.directory=corpora/x", "training.total_steps=100_000"] if "--config" in arguments else []
            config = _composed(*given, *overrides)
            processes = arguments[arguments.index("--processes") + 1] if "--processes" in arguments else "1"
            assert validate(config, world_size=int(processes)) == []
    elif module == "launch" and arguments[0] == "submit" and overrides and "..." not in arguments:
        job, config = read_job(overrides)
        assert validate(config, job.processes) == []
    elif module == "launch" and arguments[0] == "plan" and overrides and "..." not in arguments:
        read_arguments(overrides)
    elif module == "launch" and arguments[0] == "reproduce" and re.match("[a-z]", "".join(arguments[1:2])):
        read_reproduction(arguments[1], overrides)
    # NAME stands for any.
    elif module == "train.evaluate" and (chosen := [word for word in overrides if re.match("suite=[a-z]", word)]):
        schema = schema_of(suite_named(chosen[0].removeprefix("suite=")))
        compose(schema, "suite", [word for word in overrides if word.startswith("suite")])
    elif module == "launch" and arguments[0] == "calibrate":
        assert validate_calibration(compose(CalibrateConfig, "calibrate", overrides)) == []
    elif module == "data_pipeline" and arguments[0] == "prepare" and overrides:
        compose(PrepareConfig, "prepare", overrides)
    elif module == "model" and arguments[0] == "describe":
        assert validate_model(compose(ModelOnlyConfig, "model_only", overrides).model) == []
    elif module == "pytest":
        assert all((ROOT / argument).exists() for argument in arguments if "/" in argument), arguments


def test_keys_of_commands_that_are_not_run_are_checked():
    with pytest.raises(ValueError, match="no such key"):
        _check("train", ["name=a", "corpus.directory=b", "training.total_step=1"])
    with pytest.raises(AssertionError, match="do not fit into the run's 10 steps"):
        _check("train", ["name=a", "corpus.directory=b", "model=xlstm_7b", "training.total_steps=10"])
    with pytest.raises(ValueError, match="no such key"):
        _check("train.evaluate", ["runs/a", "suite=task", "suite.length=[3]"])
    with pytest.raises(ValueError, match="no such key"):
        _check("launch", ["reproduce", "parity", "reproduce.step=3"])
    for command in (
        "python -m model explain",
        "python -m model describe --fast",
        "make everything",
        "pip install .[no]",
    ):
        with pytest.raises(AssertionError):
            _check_words(command.split())
    nested = "srun bash -c 'exec torchrun --nnodes=2 -m train name=a \\\n    seed=1'"
    assert ["exec", "torchrun", "--nnodes=2", "-m", "train", "name=a", "seed=1"] in list(commands(nested))
