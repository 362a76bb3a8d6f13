"""Commands of the pages: those that need nothing special are run; of the others the syntax and the keys are checked."""

import re
import subprocess

import pytest

from conf import compose
from data_pipeline.preparing.config import PrepareConfig
from tests.docs.documentation import NEEDS, PAGES, Shell, blocks, commands, name, python_blocks, run_python
from tests.runs import ROOT
from train.config import RunConfig

ALL = [block for page in PAGES for block in blocks(page)]
README = ROOT / "README.md"
# The README's commands come first: they make corpora/first and runs/first, which the other pages use.
RUN = [README, *(page for page in PAGES if page != README and any(block.needs is None for block in blocks(page)))]
MODULES = {
    "train",
    "train.report",
    "train.evaluate",
    "launch",
    "data_pipeline",
    "model",
    "pip",
    "pytest",
    "torch.distributed.run",
}
# What the pages' commands leave behind, by page.
LEFT = {
    "README.md": ["corpora/first/manifest.json", "runs/first/report.png"],
    "docs/guides/your_corpus.md": ["corpora/both/manifest.json", "corpora/only_pages/manifest.json", "runs/mixed"],
    "docs/guides/resume.md": ["runs/first/checkpoints/step-00000008", "runs/annealed/checkpoints/step-00000010"],
}


@pytest.mark.slow
def test_commands_of_the_pages_work_in_their_order(checkout):
    shell, printed = Shell(checkout), {}
    for page in RUN:
        # Not what `make` does: tests/docs/test_readme.py.
        runnable = [block for block in blocks(page) if block.needs is None and not block.text.startswith("make ")]
        printed[page] = "".join(shell.run(block) for block in runnable)
        for path in LEFT.get(name(page), []):
            assert (checkout / path).exists(), path
    assert "6,865,424,896 parameters in 483 tensors" in printed[README]
    # The Python of the pages goes on with what the commands have made.
    printed = {page: run_python(python_blocks(page), checkout, checkout) for page in PAGES if python_blocks(page)}
    assert "torch.Size([2, 16, 4096])" in printed[ROOT / "docs" / "python.md"]
    assert (checkout / "runs" / "from_python" / "checkpoints" / "step-00000002").is_dir()
    assert (checkout / "corpora" / "from_python" / "manifest.json").is_file()


def test_the_pages_with_commands_are_found():
    assert {name(page) for page in RUN} >= LEFT.keys() | {"docs/guides/first_run.md", "docs/guides/wandb.md"}
    for page in PAGES:
        fences = re.findall(r"^```(\S.*)$", page.read_text(encoding="utf-8"), flags=re.M)
        shell = [fence for fence in fences if fence.split()[0] in ("sh", "bash", "shell", "console")]
        assert len(shell) == len(blocks(page)), f"{name(page)}: {shell}"


@pytest.mark.parametrize("block", [block for block in ALL if block.needs is not None], ids=str)
def test_commands_that_are_not_run_can_be_typed(block):
    assert block.needs in NEEDS
    checked = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for words in commands(block.text):
        if words[:1] == ["make"]:
            assert words[1] in targets
        if "-m" in words and not words[words.index("-m") + 1].isnumeric():
            # torchrun and python both take `-m module`; the last one names ours.
            position = len(words) - 1 - words[::-1].index("-m")
            _check(words[position + 1], words[position + 2 :])


def _check(module, arguments):
    assert module in MODULES, module
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("--")]
    if module == "train" or (module == "launch" and arguments[0] == "local"):
        if "--config" in arguments:
            # The run gives these.
            overrides = ["corpus.directory=corpora/x", "training.total_steps=1", *overrides]
        config = compose(RunConfig, "train", overrides)
        assert (config.training.total_steps is None) != (config.training.total_tokens is None)
    elif module == "data_pipeline" and arguments[0] == "prepare":
        compose(PrepareConfig, "prepare", overrides)


def test_keys_of_commands_that_are_not_run_are_checked():
    with pytest.raises(ValueError, match="no such key"):
        _check("train", ["name=a", "corpus.directory=b", "training.total_step=1"])
    nested = "srun bash -c 'exec torchrun --nnodes=2 -m train name=a \\\n    seed=1'"
    assert ["exec", "torchrun", "--nnodes=2", "-m", "train", "name=a", "seed=1"] in list(commands(nested))
