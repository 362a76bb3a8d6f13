"""`python -m model`: every command on real directories, and every mistake a user can make."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model.describe
from data_pipeline.tokenizing.tokenizer import Tokenizer
from model.__main__ import main
from model.generation import generate
from model.locate import locate
from model.presets import preset
from model.weights import WeightsError, load_weights, save_model
from tests.model_tools.small_models import TEXT_CONFIG, random_model
from tests.runs import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]


def expected_text(run, model_seed, prompts, **settings):
    tokenizer = Tokenizer.load(run / "tokenizer")
    ids = [[tokenizer.eod_id, *tokenizer.encode(prompt)] for prompt in prompts]
    new = generate(
        random_model(TEXT_CONFIG, model_seed),
        ids,
        stop_token=tokenizer.eod_id,
        vocab_size=tokenizer.vocab_size,
        **settings,
    )
    return [tokenizer.decode([*prompt, *row.tolist()]) for prompt, row in zip(ids, new, strict=True)]


def test_describe_prints_the_7b_in_seconds_and_little_memory():
    # ru_maxrss would be that of this test process: a child keeps the peak of the one that it was forked from.
    code = (
        "import sys, time; from model.__main__ import main; code = main(['describe', 'model=xlstm_7b']);"
        "peak = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM:')];"
        "print(time.process_time(), *peak); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "6,865,424,896 parameters in 483 tensors"
    cpu_seconds, kibibytes = lines[-1].split()
    assert float(cpu_seconds) < 60 and int(kibibytes) * 1024 < 2 * 2**30


def test_describe_json_holds_what_the_table_shows(capsys):
    arguments = ["describe", "model=neurips_125m_7_1", "--sequence-length", "2048", "--ranks", "4", "--json"]
    assert main(arguments) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["parameters"]["total"] == 163_690_928
    assert description["model"]["blocks"] == {"mlstm": 22, "slstm": 2}
    assert description["training_flops"]["sequence_length"] == 2048
    assert main([argument for argument in arguments if argument != "--json"]) == 0
    assert capsys.readouterr().out == model.describe.as_table(description) + "\n"
    assert main([*arguments[:-1], "--device", "NVIDIA H200"]) == 0
    assert "2048 tokens (kernels of NVIDIA H200), by what is recomputed" in capsys.readouterr().out
    on_gpu = model.describe.describe(preset("neurips_125m_7_1"), 2048, 1, 4, "NVIDIA H200")
    by_mode = (entry["training_memory"]["activations"] for entry in (on_gpu, description))
    assert all(ours < theirs for ours, theirs in zip(*(modes.values() for modes in by_mode), strict=True))


@pytest.mark.parametrize("preset", ["llama_7b", "xlstm_7b_mixed", "tiny"])
def test_describe_works_for_every_kind_of_block(preset, capsys):
    assert main(["describe", f"model={preset}"]) == 0
    assert "parameters in" in capsys.readouterr().out


def test_describe_reports_every_problem(capsys):
    assert main(["describe", "model=tiny", "model.n_blocks=2", "model.mlstm.n_heads=5"]) == 2
    error = capsys.readouterr().err
    assert "model.slstm_at: [2] name no block" in error
    assert main(["describe", "model=tiny", "model.mlstm.n_heads=5", "model.norm_eps=0"]) == 2
    assert main(["describe", "model.n_block=2"]) == 2
    assert "did you mean 'model.n_blocks'" in capsys.readouterr().err


def test_generate_streams_from_the_newest_complete_checkpoint(run_directory, capsys):
    prompt = 'def f(x, y): {"a": ${b}} # \u00e9'
    assert main(["generate", f"checkpoint={run_directory}", f"prompt={prompt}", "max_new_tokens=12", "seed=3"]) == 0
    [text] = expected_text(run_directory, 1, [prompt], max_new_tokens=12, seed=3, temperature=0.8, top_p=0.95)
    assert capsys.readouterr().out == text + "\n"
    assert text.startswith(prompt)


def test_generate_from_a_named_checkpoint_with_a_batch_of_prompts(run_directory, capsys):
    checkpoint = run_directory / "checkpoints" / "step-00000010"
    prompts = ["import torch", "a"]
    given = [f"prompt={prompt}" for prompt in prompts]
    assert main(["generate", f"checkpoint={checkpoint}", *given, "temperature=0", "max_new_tokens=8"]) == 0
    texts = expected_text(run_directory, 0, prompts, max_new_tokens=8, temperature=0)
    assert capsys.readouterr().out == f"--- 1\n{texts[0]}\n--- 2\n{texts[1]}\n"


def test_generate_in_bf16_and_without_a_prompt(run_directory, capsys):
    weights = run_directory / "checkpoints" / "step-00000020" / "weights"
    assert main(["generate", f"checkpoint={weights}", "dtype=bfloat16", "max_new_tokens=3", "temperature=0"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_locate_says_what_is_wrong(run_directory, tmp_path):
    torn = run_directory / "checkpoints" / "step-00000030"
    for path in (torn, torn / "weights"):
        with pytest.raises(WeightsError, match="no complete checkpoint: it has no complete.json"):
            locate(path)
    with pytest.raises(WeightsError, match="does not exist; name a run's directory"):
        locate(tmp_path / "missing")
    with pytest.raises(WeightsError, match="is nothing with weights; name a run's directory"):
        locate(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(WeightsError, match="no complete checkpoint among 1"):
        locate(tmp_path)


def test_a_step_of_a_run_is_named_behind_an_at(run_directory, tmp_path):
    checkpoint = run_directory / "checkpoints" / "step-00000010"
    found = locate(f"{run_directory}@10")
    assert found == locate(checkpoint) == locate(f"{run_directory}@00010") == locate(checkpoint / "weights")
    assert (found.step, found.run, found.checkpoint) == (10, run_directory, checkpoint)
    assert locate(run_directory).step == 20
    for missing in (f"{run_directory}@11", run_directory / "checkpoints" / "step-00000011"):
        with pytest.raises(WeightsError, match="step-00000011 does not exist; .* of the steps 10, 20$"):
            locate(missing)
    for step in ("", "last", "-10", "1e3"):
        with pytest.raises(WeightsError, match="a whole number of completed steps is wanted behind the @"):
            locate(f"{run_directory}@{step}")
    with pytest.raises(WeightsError, match="missing does not exist; name the directory of a run before the @"):
        locate(f"{tmp_path / 'missing'}@10")
    # In a name that exists it is a letter as any other.
    (tmp_path / "me@10").symlink_to(run_directory)
    assert locate(tmp_path / "me@10").step == 20 and locate(f"{tmp_path / 'me@10'}@10").step == 10


def test_mistakes_have_exit_codes_and_messages(run_directory, tmp_path, capsys):
    assert main(["generate", "chekpoint=a", "promt=b"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'checkpoint'?" in error
    assert "did you mean 'prompt'?" in error
    assert main(["export", "runs/first", "output=a"]) == 2
    assert "'runs/first': no key is given; settings are typed KEY=VALUE, such as checkpoint=runs/first" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--checkpoint", "runs/first"])
    assert ended.value.code == 2
    assert (
        "no such option: --checkpoint; settings are typed without dashes: checkpoint=VALUE" in capsys.readouterr().err
    )
    assert main(["describe", "tiny"]) == 2
    assert "tiny: a preset is named with its key: model=tiny" in capsys.readouterr().err
    assert main(["describe", "nowhere"]) == 2
    assert "nowhere does not exist; name a run's directory" in capsys.readouterr().err
    assert main(["generate", "prompt=a"]) == 2
    assert "checkpoint: a value is required; set checkpoint=VALUE" in capsys.readouterr().err
    assert main(["generate", f"checkpoint={tmp_path}", "max_new_tokens=many", "dtype=null"]) == 2
    assert "max_new_tokens" in capsys.readouterr().err
    assert main(["generate", f"checkpoint={tmp_path}"]) == 2
    assert "error: " in capsys.readouterr().err
    assert main(["generate", f"checkpoint={run_directory}", "temperature=-1", "top_p=0"]) == 2
    printed = capsys.readouterr()
    assert "temperature must be 0" in printed.err and "top_p must be above 0" in printed.err
    # Not behind the prompt.
    assert printed.out == ""
    assert main(["generate", f"checkpoint={run_directory}", "dtype=int8"]) == 2
    assert "dtype: unknown value 'int8'" in capsys.readouterr().err
    for device in ("cuda:77", "gpu"):
        assert main(["generate", f"checkpoint={run_directory}", f"device={device}"]) == 2
        assert f"device: '{device}' cannot be used here (" in capsys.readouterr().err
    save_model(random_model(TEXT_CONFIG), TEXT_CONFIG, tmp_path / "bare")
    assert main(["generate", f"checkpoint={tmp_path / 'bare'}"]) == 2
    assert "tokenizer: the checkpoint has none beside it" in capsys.readouterr().err
    assert main(["export", f"checkpoint={run_directory}", f"output={REPOSITORY}"]) == 2
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["describe", "--ranks", "0"])


def test_export_import_and_generate_again(run_directory, tmp_path, capsys):
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    assert main(["export", f"checkpoint={run_directory}", f"output={exported}"]) == 0
    printed = capsys.readouterr()
    assert "logits equal in transformers" in printed.out and printed.err == ""
    assert main(["import", f"source={exported}", f"output={imported}"]) == 0
    assert "parameters in 48 tensors" in capsys.readouterr().out
    original = dict(load_weights(locate(run_directory).weights))
    assert all(torch.equal(tensor, original[name]) for name, tensor in load_weights(imported))
    settings = ["prompt=import json", "max_new_tokens=9", "seed=1"]
    assert main(["generate", f"checkpoint={run_directory}", *settings]) == 0
    expected = capsys.readouterr().out
    # Bytes that make no character read differently in the tokenizer.json of the export, whose ids are the same.
    tokenizer = f"tokenizer={run_directory / 'tokenizer'}"
    assert main(["generate", f"checkpoint={imported}", tokenizer, *settings]) == 0
    assert capsys.readouterr().out == expected
    assert main(["generate", f"checkpoint={imported}", *settings]) == 0
    assert capsys.readouterr().out.startswith("import json")
    assert main(["import", f"source={exported}", f"output={imported}"]) == 2


def test_help_of_every_command(capsys):
    for command in ("describe", "generate", "export", "import"):
        with pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0
        assert f"python -m model {command}" in capsys.readouterr().out
