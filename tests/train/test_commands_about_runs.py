"""What is asked of a run that exists: its plan, its values for another run, its held-out losses, how it fares."""

import contextlib
import io
import json
import re
import shutil
import subprocess

import pytest
import yaml

from conf import ConfigError
from model.__main__ import main as model_main
from model.config import validate_model
from model.huggingface import export_huggingface
from model.initialisation import initialise
from model.language_model import LanguageModel
from model.loading import load
from model.locate import locate
from model.presets import preset
from model.weights import save_model
from tests.runs import PATIENCE, ROOT, TINY_RUN, environment, train_command
from tests.train.plain_runs import run_plainly
from train.__main__ import main as train_main
from train.command import compose_run, parse
from train.errors import RunError, last_words
from train.evaluate.__main__ import main as evaluate_main
from train.interpreter import python_name
from train.run_directory import EventLog, RunLock
from train.run_summary import as_lines, summarise

STEPS = 3


@pytest.fixture(scope="module")
def base(small_corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("about_runs")
    return root, [f"run_root={root}", f"corpus.directory={small_corpus}", *TINY_RUN, f"training.total_steps={STEPS}"]


@pytest.fixture(scope="module")
def run(base):
    root, overrides = base
    assert run_plainly(["name=done", *overrides, "parallel=zero0"]) == 0
    return root / "done"


def call(main, arguments):
    """(exit code, standard output, standard error) of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def test_plan_shows_the_whole_configuration_and_leaves_nothing(base, tmp_path):
    root, overrides = base
    code, out, err = call(train_main, ["--plan", "name=planned", *overrides, f"run_root={tmp_path}"])
    assert code == 0, err
    shown = yaml.safe_load(out)
    assert shown["name"] == "planned" and shown["training"]["total_steps"] == STEPS
    assert shown["optimizer"]["weight_decay"] == 0.1, "what nobody set is there too"
    assert "parameters in" in err and "samples, order" in err
    assert f"would begin in {tmp_path / 'planned'}; nothing was started" in err
    assert list(tmp_path.iterdir()) == []
    # What is printed is what --config takes.
    (tmp_path / "config.yaml").write_text(out)
    assert call(train_main, ["--plan", "--config", tmp_path, "name=planned"])[1] == out


def test_plan_of_what_cannot_work_says_why_and_ends_with_2(base, tmp_path):
    _, overrides = base
    code, out, err = call(train_main, ["--plan", "name=x", *overrides, f"run_root={tmp_path}", "training.lr=3"])
    assert (code, out) == (2, "") and "training.lr: no such key" in err
    code, _, err = call(train_main, ["--plan", "name=x", *overrides, f"corpus.directory={tmp_path}/none"])
    assert code == 2 and f"{tmp_path}/none" in err
    assert "rank" not in err, "there is one process"


def test_one_of_several_processes_says_which_it_is(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    for world_size, words in (("4", "train: rank 3: no room"), ("1", "train: no room")):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        assert last_words(RunError("no room")) == words


def test_a_complete_run_names_a_length_with_which_it_goes_on(base, run, capsys):
    _, overrides = base
    assert run_plainly(["name=done", *overrides, "parallel=zero0"]) == 0
    said = capsys.readouterr().err
    (length,) = re.findall(r"make it longer, such as by (training\.total_steps=\d+)\.", said)
    assert call(train_main, ["--plan", "name=done", *overrides, "parallel=zero0", length])[0] == 0
    assert length == f"training.total_steps={2 * STEPS}"


def test_a_run_gives_another_its_values(run):
    config = compose_run(parse(["--config", str(run), "name=other", "optimizer.learning_rate=0.5"]), 1)
    before = yaml.safe_load((run / "config.yaml").read_text())
    assert (config.name, config.optimizer.learning_rate) == ("other", 0.5)
    assert config.model.d_model == 32 and config.parallel.zero_stage == 0 and config.evaluation.interval == 0
    assert config.training.total_steps == before["training"]["total_steps"]
    assert compose_run(parse([f"--config={run / 'config.yaml'}", "name=other"]), 1).model == config.model


def test_a_choice_on_top_of_a_run_takes_the_place_of_its_section(run):
    config = compose_run(parse(["name=other", "--config", str(run), "schedule=wsd", "evaluation=none"]), 1)
    assert config.schedule.kind == "wsd" and config.evaluation.sets == {}
    assert config.model.d_model == 32


def test_what_is_wrong_with_a_run_to_start_from_is_said(run, tmp_path):
    def problems(*arguments):
        with pytest.raises(ConfigError) as caught:
            compose_run(parse(arguments), 1)
        return caught.value.problems

    assert problems("--config") == ["--config: name the config.yaml of a run, or the run's directory"]
    assert problems("--config", str(run)) == [
        f"name: {run} gives a new run its values; give name=NAME (name=done goes on with that run)"
    ]
    (problem,) = problems("--config", str(tmp_path), "name=x")
    assert "cannot be read (No such file or directory); name a run's directory or its config.yaml" in problem
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "holds no keys and values" in problems("--config", str(tmp_path / "list.yaml"), "name=x")[0]
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    assert "is no YAML" in problems("--config", str(tmp_path / "bad.yaml"), "name=x")[0]
    text = (run / "config.yaml").read_text().replace("learning_rate:", "lerning_rate:")
    (tmp_path / "odd.yaml").write_text(text)
    assert any(
        line.startswith("optimizer.lerning_rate: no such key (did you mean 'learning_rate'?)")
        for line in problems("--config", str(tmp_path / "odd.yaml"), "name=x")
    )
    assert (
        "experiment=demo: sets values in many sections"
        in problems("--config", str(run), "name=x", "experiment=demo")[0]
    )


def test_a_run_of_0_2_0_gives_its_values(tmp_path):
    folder = min((ROOT / "tests" / "fixtures" / "0.2.0").glob("**/config.yaml"))
    config = compose_run(parse(["--config", str(folder), "name=other"]), 1)
    assert config.name == "other" and config.logging.samples.interval == 0 and not config.logging.csv


def own_figures(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["set"]: (line["loss"], line["tokens"]) for line in lines if line["kind"] == "evaluation"}


def test_a_run_is_evaluated_as_it_did_itself(run):
    code, out, err = call(evaluate_main, [run])
    assert code == 0, err
    path = run / "evaluations" / f"step-{STEPS:08d}.json"
    assert out.splitlines()[0].split() == ["set", "loss", "perplexity", "tokens"]
    assert out.splitlines()[-1] == f"written to {path}"
    found = json.loads(path.read_text())
    assert {name: (r["loss"], r["tokens"]) for name, r in found["results"].items()} == own_figures(run)
    assert (found["step"], found["trained_tokens"]) == (STEPS, STEPS * 8 * 32)
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    assert found["results"]["validation"]["fingerprint"] in [event.get("fingerprint") for event in events]


def test_another_split_a_checkpoint_and_another_file_can_be_named(run, tmp_path):
    arguments = [run / "checkpoints" / f"step-{STEPS:08d}", "--output", tmp_path / "out.json"]
    arguments += ["evaluation.sets.validation.split=train", "evaluation.sets.validation.max_tokens=512"]
    assert call(evaluate_main, arguments)[0] == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["sets"]["validation"]["by_source"] is False, "a part by source would be another part"
    assert found["sets"]["validation"]["split"] == "train" and found["results"]["validation"]["tokens"] == 512


def test_weights_without_a_run_are_evaluated_on_a_corpus_that_is_named(run, small_corpus, tmp_path):
    weights = shutil.copytree(run / "checkpoints" / f"step-{STEPS:08d}" / "weights", tmp_path / "weights")
    code, _, err = call(evaluate_main, [weights])
    assert code == 2 and "corpus.directory: a value is required" in err
    settings = ["precision=fp32", "training.sequence_length=32", f"corpus.directory={small_corpus}"]
    code, _, err = call(evaluate_main, [weights, *settings, "--output", tmp_path / "whole.json"])
    assert code == 0 and f"WARNING    {weights} has no tokenizer: do its ids mean the same text?" in err
    assert json.loads((tmp_path / "whole.json").read_text())["sets"]["validation"]["by_source"] is True
    assert call(evaluate_main, [weights, *settings, "evaluation.sets.validation.max_tokens=256"])[0] == 0
    found = json.loads((weights / "evaluation.json").read_text())
    loss, tokens = own_figures(run)["validation"]
    assert found["results"]["validation"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["results"]["validation"]["tokens"] == tokens and found["step"] is None


def test_a_model_is_not_evaluated_on_ids_that_mean_other_text_to_it(run, small_corpus, tmp_path):
    theirs = ROOT / "tests" / "fixtures" / "0.2.0" / "corpus" / "tokenizer"
    weights = shutil.copytree(run / "checkpoints" / f"step-{STEPS:08d}" / "weights", tmp_path / "weights")
    shutil.copytree(theirs, weights / "tokenizer")
    settings = ["precision=fp32", "training.sequence_length=32", f"corpus.directory={small_corpus}"]
    code, _, err = call(evaluate_main, [weights, *settings])
    assert code == 2 and f"{small_corpus} was prepared with another tokenizer than the weights were trained with" in err
    assert f"tokenizer.path={weights / 'tokenizer' / 'tokenizer.model'}" in err
    (weights / "tokenizer" / "tokenizer.model").write_bytes(b"torn")
    code, _, err = call(evaluate_main, [weights, *settings])
    assert code == 2 and f"{weights}: its tokenizer cannot be read" in err


def test_a_hugging_face_directory_is_evaluated(small_corpus, tmp_path):
    config = preset("tiny", vocab_size=384, d_model=128, n_blocks=2, slstm_at=[], slstm=None, ffn_dim=64,
                    mlstm={"n_heads": 1})  # fmt: skip
    assert not validate_model(config)
    model = LanguageModel(config)
    initialise(model, seed=0)
    save_model(model, config, tmp_path / "weights")
    export_huggingface(tmp_path / "weights", tmp_path / "hf", None, verify=False)
    settings = [f"corpus.directory={small_corpus}", "precision=fp32", "training.sequence_length=32"]
    settings += ["evaluation.sets.validation.max_tokens=64"]
    results = []
    for name in ("weights", "hf"):
        code, _, err = call(evaluate_main, [tmp_path / name, *settings])
        assert code == 0, err
        results.append(json.loads((tmp_path / name / "evaluation.json").read_text())["results"]["validation"])
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)


def test_what_cannot_be_evaluated_is_said(run, tmp_path):
    assert evaluate_main(["--help"]) == 0
    assert evaluate_main([]) == 2
    cases = [
        ([tmp_path / "none"], "does not exist"),
        ([run, run], "name one model"),
        ([run, "--output"], "--output: name the file"),
        ([run, "--out", "x"], "--out: no such option (did you mean '--output'?)"),
        ([run, "model=tiny"], "the model is evaluated as it is"),
        ([run, "evaluation=none"], "evaluation.sets: there is none to score"),
        ([run, "evaluation.sets.validation.split=tset"], "; where nothing is held out, train with evaluation=none"),
        ([run, "evaluation.batch_size=0"], "evaluation.batch_size: must be at least 1"),
        ([run, "corpus.directory=none"], "none"),
    ]
    for arguments, words in cases:
        code, _, err = call(evaluate_main, arguments)
        assert code == 2 and words in err, (arguments, err)


@pytest.mark.slow
def test_two_ranks_evaluate_as_one(run, tmp_path):
    command = train_command([str(run), "--output", str(tmp_path / "two.json")], 2, "train.evaluate")
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    loss, tokens = own_figures(run)["validation"]
    found = json.loads((tmp_path / "two.json").read_text())["results"]["validation"]
    assert found["loss"] == pytest.approx(loss, rel=1e-6) and found["tokens"] == tokens
    assert done.stdout.count("written to") == 1


def test_a_run_is_described_with_what_comes_next(run):
    code, out, err = call(model_main, ["describe", run])
    assert code == 0, err
    found = [" ".join(line.split()) for line in out.splitlines()]
    assert f"run done in {run}" in found and "state complete" in found
    assert f"progress {STEPS} of {STEPS} steps, {STEPS * 256} tokens" in found
    assert f"checkpoints {STEPS}" in found and f"{python_name()} -m train.evaluate {run}" in found
    parameters = sum(parameter.numel() for parameter in load(run).parameters())
    assert any(line.startswith(f"{parameters:,} parameters in") for line in found)
    described = json.loads(call(model_main, ["describe", run, "--json"])[1])
    assert described["run"]["steps"] == STEPS and described["parameters"]["total"] == parameters
    assert described["run"]["held_out"]["validation"]["loss"] == own_figures(run)["validation"][0]


def test_the_state_of_a_run_is_that_of_its_last_start(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    events = EventLog(copy / "events.jsonl", is_main=True)
    for kind, fields, state, reason in [
        ("stop", {"step": 2, "reason": "SIGTERM"}, "stopped", "SIGTERM"),
        ("resume", {"step": 2}, "ended without a word", "the process was killed, or its machine was lost"),
        ("error", {"message": "no room"}, "failed", "no room"),
    ]:
        events.append(kind, **fields)
        summary = summarise(copy)
        assert (summary["state"], summary["reason"]) == (state, reason)
        assert f"{python_name()} -m train --config {copy} name=done" in as_lines(summary)
    lock = RunLock(copy / "run.lock")
    assert summarise(copy)["state"] == "running"
    lock.release()
    (copy / "events.jsonl").unlink()
    (copy / "metrics.jsonl").unlink()
    shutil.rmtree(copy / "checkpoints")
    summary = summarise(copy)
    assert summary["state"] == "not started" and summary["loss"] is None
    assert "checkpoints none yet" in as_lines(summary)


def test_what_is_no_run_cannot_be_described(run, tmp_path):
    code, _, err = call(model_main, ["describe", tmp_path])
    assert code == 2 and "is nothing with weights; name a run's directory" in err
    code, _, err = call(model_main, ["describe", run, "model=tiny"])
    assert code == 2 and "leave the other settings out" in err


def test_a_step_of_a_run_and_a_weights_directory_are_described_and_evaluated(run, tmp_path):
    step = f"{run}@{locate(run).step}"
    code, out, _ = call(model_main, ["describe", step])
    assert code == 0 and f"step        {locate(run).step}" in out and str(run / "tokenizer") in out
    code, out, _ = call(model_main, ["describe", locate(run).weights, "--json"])
    assert code == 0 and json.loads(out)["weights"] == str(locate(run).weights)
    code, _, err = call(model_main, ["describe", f"{run}@77"])
    assert code == 2 and "step-00000077 does not exist" in err
    code, _, err = call(evaluate_main, [step, "--output", tmp_path / "scores.json"])
    assert code == 0, err
    assert json.loads((tmp_path / "scores.json").read_text())["step"] == locate(run).step
    assert call(evaluate_main, [f"{run}@77"])[0] == 2
