"""`python -m model generate` on real directories: how tokens are chosen, where texts end, and states in files."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.tokenizing.tokenizer import Tokenizer
from model.__main__ import main
from model.generation import generate
from tests.model_tools.small_models import TEXT_CONFIG, random_model
from tests.runs import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPT = "import torch"


@pytest.fixture
def printed(run_directory, capsys):
    """What the command prints to its output, when all is well."""

    def run(*arguments):
        assert main(["generate", f"checkpoint={run_directory}", *arguments]) == 0
        return capsys.readouterr().out

    return run


def expected(run, prompt, **settings):
    tokenizer = Tokenizer.load(run / "tokenizer")
    ids = [tokenizer.eod_id, *tokenizer.encode(prompt)]
    # The newest complete checkpoint has the weights of seed 1.
    model = random_model(TEXT_CONFIG, 1)
    new = generate(model, [ids], stop_token=tokenizer.eod_id, vocab_size=tokenizer.vocab_size, **settings)
    return tokenizer.decode([*ids, *new[0].tolist()])


def test_min_p_and_the_repetition_penalty_are_used(run_directory, printed):
    given = {"max_new_tokens": 30, "temperature": 2.0, "top_p": 1.0, "seed": 5}
    arguments = [f"prompt={PROMPT}", *(f"{key}={value}" for key, value in given.items())]
    plain = printed(*arguments)
    assert plain == expected(run_directory, PROMPT, **given) + "\n"
    for key, value in (("min_p", 0.5), ("repetition_penalty", 3.0)):
        changed = printed(*arguments, f"{key}={value}")
        assert changed == expected(run_directory, PROMPT, **given, **{key: value}) + "\n"
        assert changed != plain


def test_a_text_ends_before_the_first_of_its_stop_strings(printed):
    arguments = [f"prompt={PROMPT}", "max_new_tokens=40", "temperature=0"]
    whole = printed(*arguments).removesuffix("\n")
    new = whole.removeprefix(PROMPT)
    early, late = new[6:9], new[20:24]
    assert printed(*arguments, f"stop={late}", f"stop={early}") == PROMPT + new[: new.index(early)] + "\n"
    # Each of several texts by itself.
    both = printed(*arguments, "prompt=a", f"stop={late}")
    assert both.startswith(f"--- 1\n{PROMPT}{new[: new.index(late)]}\n--- 2\na")


def test_what_was_read_is_written_and_continued_as_if_it_were_one_text(printed, tmp_path):
    file = tmp_path / "read.safetensors"
    rest = ["max_new_tokens=12", "temperature=0"]
    whole = printed("prompt=import torch\n", *rest)
    assert printed("prompt=import torch\n", *rest, f"save_state={file}") == whole
    # Only what is new is shown; without a prompt that is what the model writes.
    assert printed(f"state={file}", *rest) == whole.removeprefix("import torch\n")
    with_more = printed("prompt=import torch\ndef f(", *rest)
    assert printed("prompt=def f(", f"state={file}", *rest) == with_more.removeprefix("import torch\n")
    # A state may be read on from, and written again.
    further = tmp_path / "further.safetensors"
    printed("prompt=def f(", f"state={file}", f"save_state={further}", *rest)
    assert printed(f"state={further}", *rest) == with_more.removeprefix("import torch\ndef f(")
    both = printed(f"state={file}", "prompt=def f(", "prompt=def f(", *rest)
    assert both.count(with_more.removeprefix("import torch\n").removesuffix("\n")) == 2


def test_mistakes_are_told_together_and_before_a_model_is_loaded(tmp_path, capsys):
    there, absent = tmp_path / "there", tmp_path / "absent"
    there.write_text("")
    arguments = ["checkpoint=nowhere", "min_p=2", "repetition_penalty=0", "stop=", "prompt=a", "prompt=b"]
    assert main(["generate", *arguments, f"save_state={there}", f"state={absent}"]) == 2
    error = capsys.readouterr().err
    for problem in (
        "min_p must be from 0 to 1, not 2.0",
        "repetition_penalty must be positive (1: none), not 0.0",
        "stop must not be empty",
        f"save_state: {there} exists; name a new file",
        "save_state: takes what one prompt leaves, not 2; give one",
        f"state: {absent} does not exist; name a file that save_state wrote",
    ):
        assert problem in error
    for name, problem in (("s3://bucket/a", "must be"), (f"{absent}/a", f"the folder of {absent}/a does not exist")):
        assert main(["generate", "checkpoint=nowhere", f"save_state={name}"]) == 2
        assert problem in capsys.readouterr().err


def test_a_state_of_another_checkpoint_or_dtype_is_refused(run_directory, printed, tmp_path, capsys):
    file = tmp_path / "read.safetensors"
    printed(f"save_state={file}", "max_new_tokens=1")
    for arguments in ([f"checkpoint={run_directory}@10"], [f"checkpoint={run_directory}", "dtype=bfloat16"]):
        assert main(["generate", *arguments, f"state={file}"]) == 2
        assert f"{file} is the state of another model, or of these weights in another dtype" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["generate", f"checkpoint={run_directory}", f"state={file}"]) == 2
    assert "cannot be read (damaged or cut short)" in capsys.readouterr().err


def test_a_text_appears_as_it_grows(run_directory):
    command = [sys.executable, "-m", "model", "generate", f"checkpoint={run_directory}", f"prompt={PROMPT}"]
    with subprocess.Popen(
        [*command, "max_new_tokens=3000"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=REPOSITORY
    ) as process:
        assert process.stdout.read(len(PROMPT) + 5).decode(errors="replace").startswith(PROMPT)
        # It still writes.
        assert process.poll() is None
        process.kill()
        process.stdout.close()
        process.wait(PATIENCE)
