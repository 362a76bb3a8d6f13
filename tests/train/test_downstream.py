"""The suite `downstream`: lm-eval's own answers of transformers' models are ours; what is done is not done again."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import transformers

from data_pipeline.tokenizing.tokenizer import Tokenizer
from model import load
from model.huggingface import export_huggingface
from model.locate import locate
from model.weights import save_model
from tests.model_tools.test_huggingface import random_transformers_model
from tests.model_tools.test_huggingface_tokenizer import byte_level_json
from tests.runs import PATIENCE, ROOT, environment, run_script
from tests.train.harness_tasks import write_tasks
from train.config import RunConfig
from train.evaluate.command import main
from train.evaluate.suites.base import Subject
from train.evaluate.suites.downstream import DownstreamSettings, DownstreamSuite
from train.evaluate.suites.results import read_results
from train.parallel.mesh import join_mesh

IS_INSTALLED = importlib.util.find_spec("lm_eval") is not None and importlib.util.find_spec("accelerate") is not None
needs_harness = pytest.mark.skipif(
    not IS_INSTALLED, reason="needs lm-eval and accelerate: pip install 'xlstm-pretrain[evaluation]' accelerate"
)
# Shorter than the longest text: windows of it are scored.
MAX_LENGTH = 48


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each family: a directory that transformers wrote, our weights of it, and our export of those."""
    root = tmp_path_factory.mktemp("models")
    byte_level_json(root / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(root / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    llama = transformers.LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(4)
    models = {
        "xlstm": random_transformers_model(vocab_size=500),
        "llama": transformers.LlamaForCausalLM(llama).eval(),
    }
    found = {}
    for family, model in models.items():
        theirs, ours, exported = (root / family / name for name in ("theirs", "ours", "exported"))
        model.save_pretrained(theirs)
        tokenizer.save_pretrained(theirs)
        imported = load(theirs)
        save_model(imported, imported.config, ours)
        (ours / "tokenizer").mkdir()
        (ours / "tokenizer" / "tokenizer.json").write_bytes((root / "tokenizer.json").read_bytes())
        export_huggingface(imported, exported, Tokenizer.load(ours / "tokenizer"), sequence_length=128)
        found[family] = (theirs, ours, exported)
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "local"
    return folder, write_tasks(folder)


def asked(model, tasks) -> dict[str, list]:
    """Task -> the answers to its requests, in order."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder, names = tasks
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=model, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0)
    return {task: [sample["resps"] for sample in samples] for task, samples in found["samples"].items()}


def of_harness(directory, tasks) -> dict[str, list]:
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=3, max_length=MAX_LENGTH)
    return asked(model, tasks)


def of_ours(path, tasks, folder, seed=0) -> dict[str, list]:
    from train.evaluate.suites.answers import Answers
    from train.evaluate.suites.harness_model import HarnessModel

    mesh = join_mesh(timedelta(seconds=60))
    try:
        located = locate(path)
        subject = Subject(load(path).eval(), located, RunConfig(name="x"), mesh, False)
        folder.mkdir(exist_ok=True)
        answers = Answers(folder / "answers.jsonl", str(path), mesh)
        return asked(HarnessModel(subject, answers, MAX_LENGTH, 5, seed), tasks)
    finally:
        mesh.close()


def numbers(answers) -> list[float]:
    """Every log likelihood, however deep in lists."""
    if isinstance(answers, list | tuple):
        return [number for one in answers for number in numbers(one)]
    return [answers] if isinstance(answers, float) else []


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize("family", ["xlstm", "llama"])
def test_every_log_likelihood_is_that_of_transformers_model(family, folders, tasks, tmp_path):
    theirs, ours, exported = folders[family]
    expected = of_harness(theirs, tasks)
    assert {task: len(numbers(answers)) > 11 for task, answers in expected.items()} == {
        "local_choice": True, "local_last_word": True, "local_text": True, "local_writing": False,
    }  # fmt: skip
    others = [of_ours(theirs, tasks, tmp_path), of_ours(ours, tasks, tmp_path), of_harness(exported, tasks)]
    for found in others:
        for task in ("local_choice", "local_last_word", "local_text"):
            assert numbers(found[task]) == pytest.approx(numbers(expected[task]), abs=1e-4)
        assert found["local_writing"] == expected["local_writing"]
    written = [text for one in expected["local_writing"] for (text,) in one]
    assert any(written) and not any("e" in text for text in written)


@needs_harness
@pytest.mark.slow
def test_the_command_asks_tasks_and_appends_the_result(folders, tasks, capsys, tmp_path):
    folder, names = tasks
    output = tmp_path / "found.jsonl"
    command = [str(folders["xlstm"][1]), "suite=downstream", f"suite.task_folder={folder}", "--output", str(output)]
    file = folder / "local_choice.yaml"
    assert main([*command, f"suite.tasks=[{file},local_text]", "suite.limit=5", "suite.max_length=64"]) == 0
    printed = capsys.readouterr().out
    assert "local_choice" in printed and "bits_per_byte" in printed and "note: of the first 5 examples" in printed
    (line,) = read_results(output)
    assert line["suite"] == "downstream" and line["results"]["local_choice"]["examples"] == 5
    assert 0 <= line["results"]["local_choice"]["acc"] <= 1 and line["results"]["local_text"]["word_perplexity"] > 1
    assert not (tmp_path / "evaluations").is_dir() or not any((tmp_path / "evaluations").rglob("answers.jsonl"))
    assert main([*command, "suite.tasks=[no_such_task]"]) == 2
    assert "suite.tasks: lm-eval has no task no_such_task" in capsys.readouterr().err
    assert main([*command, "suite.tasks=[local_writing]", "suite.max_length=6"]) == 2
    assert "suite.max_length: 6 tokens have no room for the 6" in capsys.readouterr().err


@needs_harness
@pytest.mark.slow
def test_texts_that_are_drawn_follow_the_seed_and_settings_that_are_not_known_are_refused(folders, tmp_path, capsys):
    folder = tmp_path / "drawn"
    write_tasks(folder)
    task = (folder / "local_writing.yaml").read_text()
    (folder / "local_writing.yaml").write_text(task.replace("do_sample: false", "do_sample: true\n  temperature: 1.0"))
    (folder / "local_text.yaml").write_text(
        task.replace("local_writing", "beams").replace("do_sample:", "num_beams: 3 #")
    )
    found = {
        seed: of_ours(folders["xlstm"][1], (folder, ["local_writing"]), tmp_path / str(seed), seed) for seed in (0, 1)
    }
    again = of_ours(folders["xlstm"][1], (folder, ["local_writing"]), tmp_path / "again", 1)
    assert found[0] != found[1] == again
    command = [str(folders["xlstm"][1]), "suite=downstream", f"suite.task_folder={folder}", "suite.tasks=[beams]"]
    assert main([*command, "--output", str(tmp_path / "found.jsonl")]) == 2
    assert "suite.tasks: a task asks to generate with num_beams, which is not known here" in capsys.readouterr().err


@needs_harness
@pytest.mark.slow
def test_two_processes_give_the_result_of_one(folders, tasks, tmp_path):
    folder, names = tasks
    results = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.jsonl"
        chosen = f"suite.tasks=[{','.join(names)}]"
        arguments = [str(folders["xlstm"][1]), "suite=downstream", f"suite.task_folder={folder}", chosen]
        limits = ["suite.max_length=64", "suite.batch_size=3", "--output", str(output)]
        done = run_script(ROOT / "train" / "evaluate" / "__main__.py", [*arguments, *limits], processes)
        assert done.returncode == 0, done.stderr
        results.append(read_results(output)[0]["results"])
    for task in names:
        assert results[1][task] == pytest.approx(results[0][task], rel=1e-5)


@needs_harness
@pytest.mark.slow
def test_what_is_answered_is_not_asked_again_after_a_kill(folders, tasks, tmp_path):
    folder, _ = tasks
    output, answers = tmp_path / "found.jsonl", tmp_path / "evaluations" / "downstream" / "answers.jsonl"
    command = [sys.executable, "-m", "train.evaluate", str(folders["xlstm"][1]), "suite=downstream"]
    command += [f"suite.task_folder={folder}", "suite.tasks=[local_choice,local_text]", "suite.batch_size=1"]
    command += ["--output", str(output)]
    killed = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + PATIENCE
    while not answers.is_file() or len(answers.read_bytes().splitlines()) < 6:
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not output.exists()
    # An answer that no model gives shows that it is taken from the file; a torn line does not hinder.
    lines = answers.read_text().splitlines()
    changed = [json.loads(line) for line in lines[1:6]]
    for line in changed:
        line["answer"] = [-0.0, True]
    answers.write_text("\n".join([lines[0], *map(json.dumps, changed), lines[1][:20]]))
    before = os.environ.copy()
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    resumed = read_results(output)[0]["results"]
    assert not answers.exists() and os.environ == before
    assert main([*command[3:-1], str(tmp_path / "anew.jsonl")]) == 0
    anew = read_results(tmp_path / "anew.jsonl")[0]["results"]
    assert resumed != anew


def test_settings_that_make_no_sense_are_refused(tmp_path):
    settings = DownstreamSettings(
        "downstream", [f"{tmp_path}/no.yaml"], f"{tmp_path}/none", num_fewshot=-1, limit=0, batch_size=0, max_length=1
    )
    found = "\n".join(DownstreamSuite().validate(settings))
    for key in ("tasks: ", "task_folder: ", "num_fewshot: ", "limit: ", "batch_size: ", "max_length: "):
        assert f"suite.{key}" in found
    assert "suite.tasks: names no task" in "\n".join(DownstreamSuite().validate(DownstreamSettings("downstream", [])))


@pytest.mark.skipif(IS_INSTALLED, reason="lm-eval is installed")
def test_without_the_package_the_suite_says_what_to_install():
    (problem,) = DownstreamSuite().validate(DownstreamSettings("downstream", ["arc_easy"]))
    assert problem.endswith("not installed: pip install 'xlstm-pretrain[evaluation]'")
