"""Export to our own format for transformers: every kind of model computes and generates there what it does here."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import model.huggingface.exporting as exporting
from model import generate, load
from model.__main__ import main
from model.config import ModelConfig
from model.huggingface import HuggingFaceError, export_huggingface, import_huggingface
from model.huggingface.plugin import StateCache, XLSTMPretrainForCausalLM, register
from model.initialisation import initialise
from model.weights import save_model
from tests.model_tools.small_models import CONFIGS, random_model
from tests.runs import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def tokens(rows, length, seed=7):
    # Without 0, which `generate` takes for padding where no mask says otherwise.
    return torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Name of a configuration -> (our model, its folder), written when it is first asked for."""
    made, root = {}, tmp_path_factory.mktemp("exported")

    def of(name):
        if name not in made:
            model = random_model(CONFIGS[name]).eval()
            [note] = export_huggingface(model, root / name, format="plugin", verify=False)
            assert "trust_remote_code=True" in note
            made[name] = model, root / name
        return made[name]

    register()
    return of


def in_transformers(folder, **settings):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    assert type(model) is XLSTMPretrainForCausalLM and not model.training
    return model


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_and_greedy_text_are_ours(name, exported):
    ours, folder = exported(name)
    theirs = in_transformers(folder)
    whole = tokens(2, 75)
    assert torch.equal(theirs(whole).logits, ours(whole).logits)
    prompts = [tokens(1, 23)[0], tokens(1, 9, seed=8)[0]]
    expected = generate(ours, prompts, max_new_tokens=12, temperature=0.0)
    # What stands in the padding has no part in it.
    ids, mask = torch.full((2, 23), 5), torch.ones(2, 23, dtype=torch.int64)
    ids[0], ids[1, 14:], mask[1, :14] = prompts[0], prompts[1], 0
    assert torch.equal(theirs.generate(ids, attention_mask=mask, **GREEDY)[:, 23:], expected)
    assert torch.equal(theirs.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)[:, 23:], expected)
    assert torch.equal(theirs.generate(prompts[0][None], **GREEDY)[:, 23:], expected[:1])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_is_bitwise(name, exported):
    ours, folder = exported(name)
    config, state_dict = import_huggingface(folder)
    assert config == ours.config
    parameters = dict(ours.named_parameters())
    assert state_dict.keys() == parameters.keys()
    assert all(torch.equal(state_dict[key], parameters[key]) for key in parameters)


@pytest.mark.parametrize("name", ["hybrid", "neurips", "window"])
@torch.no_grad()
def test_beam_search_with_states_finds_what_it_finds_without(name, exported):
    theirs = in_transformers(exported(name)[1])
    ids = tokens(2, 17)
    with_states = theirs.generate(ids, num_beams=3, **GREEDY)
    assert torch.equal(with_states, theirs.generate(ids, num_beams=3, use_cache=False, **GREEDY))
    assert not torch.equal(with_states, theirs.generate(ids, **GREEDY))


@torch.no_grad()
def test_a_state_is_continued_in_stretches_and_copies(exported):
    ours, folder = exported("hybrid")
    theirs, ids = in_transformers(folder), tokens(2, 40)
    cache = theirs(ids[:, :30], logits_to_keep=1).past_key_values
    branch = copy.deepcopy(cache)
    for start, end in ((30, 31), (31, 38), (38, 40)):
        logits = theirs(ids[:, start:end], past_key_values=cache).logits
    assert cache.get_seq_length() == 40
    torch.testing.assert_close(logits[:, -1], ours(ids).logits[:, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        theirs(ids[:, 30:], past_key_values=branch, logits_to_keep=3).logits,
        ours(ids).logits[:, -3:],
        atol=1e-4,
        rtol=1e-4,
    )
    parts = theirs.generate(ids, past_key_values=StateCache(), prefill_chunk_size=16, **GREEDY)
    assert torch.equal(parts, theirs.generate(ids, **GREEDY))


@pytest.mark.parametrize("name", ["mlstm", "attention", "neurips"])
def test_labels_give_our_loss_and_gradients(name, exported):
    ours, folder = exported(name)
    theirs, ids = in_transformers(folder), tokens(2, 30)
    labels = ids.masked_fill(torch.arange(30) < 4, -100)
    targets = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected, output = ours(ids, targets=targets).loss, theirs(ids, labels=labels)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(theirs(ids, labels=labels, num_items_in_batch=104).loss, expected / 2)
    assert output.logits.shape == (2, 30, 96)
    output.loss.backward()
    (gradient,) = torch.autograd.grad(expected, [ours.embedding.weight])
    torch.testing.assert_close(theirs.model.embedding.weight.grad, gradient)
    # Padding on the left predicts nothing.
    padded, mask = torch.cat([ids[:, :3], ids], dim=1), torch.ones(2, 33, dtype=torch.int64)
    mask[:, :3] = 0
    torch.testing.assert_close(theirs(padded, labels=padded, attention_mask=mask).loss, theirs(ids, labels=ids).loss)
    assert theirs.train()(ids).past_key_values is None


def test_a_head_that_is_tied_stays_so(exported, tmp_path):
    ours, folder = exported("attention")
    assert "model.lm_head.weight" not in load_file(folder / "model.safetensors")
    theirs = in_transformers(folder)
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    theirs.save_pretrained(tmp_path)
    config, state_dict = import_huggingface(tmp_path)
    assert config == ours.config and "lm_head.weight" not in state_dict
    assert torch.equal(load(tmp_path)(tokens(1, 9)).logits, ours(tokens(1, 9)).logits)
    assert (tmp_path / "modeling_xlstm_pretrain.py").read_bytes() == (
        folder / "modeling_xlstm_pretrain.py"
    ).read_bytes()


def test_shards_are_put_together(exported, tmp_path, monkeypatch):
    ours, _ = exported("hybrid")
    monkeypatch.setattr(exporting, "SHARD_BYTES", 200_000)
    export_huggingface(ours, tmp_path / "out", format="plugin", dtype=torch.bfloat16)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    theirs, (_, state_dict) = in_transformers(tmp_path / "out"), import_huggingface(tmp_path / "out")
    for name, parameter in ours.named_parameters():
        assert torch.equal(theirs.model.get_parameter(name), parameter.to(torch.bfloat16))
        assert torch.equal(state_dict[name], parameter.to(torch.bfloat16))


def test_dtypes_and_weights_that_are_missing(exported, tmp_path):
    ours, folder = exported("sigmoid")
    assert in_transformers(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    export_huggingface(ours, tmp_path / "out", format="plugin", verify=False)
    weights = tmp_path / "out" / "model.safetensors"
    lost = "model.blocks.1.mixer.fgate.bias"
    save_file({name: tensor for name, tensor in load_file(weights).items() if name != lost}, weights, {"format": "pt"})
    filled = in_transformers(tmp_path / "out").model.state_dict()
    kept = ours.state_dict()
    assert {name for name in kept if not torch.equal(kept[name], filled[name])} == {lost.removeprefix("model.")}
    # As a model begins: from 3 to 6.
    assert filled[lost.removeprefix("model.")].tolist() == [3.0, 4.0, 5.0, 6.0]
    with pytest.raises(HuggingFaceError, match=f"tensor {lost} is missing"):
        import_huggingface(tmp_path / "out")


def test_what_cannot_be_computed_is_refused(exported):
    theirs = in_transformers(exported("mlstm")[1])
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, 3] = 0
    refused = {
        "output_hidden_states: this model takes no such argument": {"output_hidden_states": True},
        "position_ids: this model takes no such argument": {"position_ids": mask},
        "padding between the tokens of a row": {"attention_mask": mask},
        r"of shape \[B, 6\], for the 0 tokens that were read and the 6": {"attention_mask": mask[:, :5]},
        "goes on from what it has returned itself": {"past_key_values": transformers.DynamicCache()},
        "leave logits_to_keep at 0": {"labels": ids, "logits_to_keep": 1},
    }
    for text, arguments in refused.items():
        with pytest.raises(ValueError, match=text):
            theirs(ids, **arguments)
    with pytest.raises(ValueError, match="vocabulary of this model is fixed"):
        theirs.resize_token_embeddings(128)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        theirs.generate(ids[:1], prompt_lookup_num_tokens=2, **GREEDY)


def test_a_folder_that_says_what_is_not_so_is_refused(exported, tmp_path):
    export_huggingface(exported("mlstm")[0], tmp_path / "out", format="plugin", verify=False)
    path = tmp_path / "out" / "config.json"
    good = json.loads(path.read_text())
    (tmp_path / "out" / "evil.py").write_text("raise SystemExit('it was run')")
    for wrong, text in (
        ({"format_version": 2}, "a later version wrote it: upgrade xlstm-pretrain"),
        ({"model": None}, "no section 'model'"),
        ({"model": {**good["model"], "n_blocks": "three"}}, "model.n_blocks cannot be"),
        ({"model": {**good["model"], "block": "odd"}}, "model.block"),
        ({"vocab_size": 97}, "vocab_size is 97, but the section 'model' says 96: change it there"),
        ({"model": {**good["model"], "plugins": ["out.evil"]}}, "model.plugins names 'out.evil': import it in your"),
    ):
        path.write_text(json.dumps({**good, **wrong}))
        with pytest.raises(HuggingFaceError, match=text):
            import_huggingface(tmp_path / "out")
        with pytest.raises(HuggingFaceError, match=text):
            transformers.AutoConfig.from_pretrained(tmp_path / "out")


def test_the_command_writes_what_it_was_refused_otherwise(tmp_path, capsys):
    config = dataclasses.replace(CONFIGS["hybrid"], n_blocks=3)
    save_model(random_model(config), config, tmp_path / "weights")
    command = ["export", f"checkpoint={tmp_path / 'weights'}", f"output={tmp_path / 'out'}"]
    assert main(command) == 2
    assert (
        "xLSTM format cannot express this model; format=plugin can:\n  - slstm blocks at [1]" in capsys.readouterr().err
    )
    assert main([*command, "format=gguf"]) == 2
    assert "format: unknown value 'gguf'; choose transformers or plugin" in capsys.readouterr().err
    assert main([*command, "format=plugin"]) == 0
    assert "(logits equal in transformers)" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_xlstm_pretrain.py",
    ]
    assert main(["import", f"source={tmp_path / 'out'}", f"output={tmp_path / 'back'}"]) == 0
    assert load(tmp_path / "back").config == load(tmp_path / "out").config == config


def run_python(code, tmp_path, path):
    # transformers copies code that it trusts into its cache.
    environment = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment,
        cwd=tmp_path,
    )


def test_a_process_that_trusts_the_folder_needs_no_registration(exported, tmp_path):
    ours, folder = exported("neurips")
    code = f"""
import sys, model
assert "transformers" not in sys.modules
import torch, transformers
theirs = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
torch.save(theirs(torch.arange(20)[None]).logits, "logits.pt")
theirs.save_pretrained("again")
"""
    done = run_python(code, tmp_path, str(REPOSITORY))
    assert done.returncode == 0, done.stderr
    # Processes may compute with other numbers of threads.
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours(torch.arange(20)[None]).logits.detach())
    saved, first = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "again", folder))
    assert {key: saved[key] for key in ("model", "auto_map", "format_version")} == {
        key: first[key] for key in ("model", "auto_map", "format_version")
    }
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(p.name for p in folder.iterdir())


def test_a_process_without_this_package_is_told_what_to_install(exported, tmp_path):
    code = (exported("neurips")[1] / "modeling_xlstm_pretrain.py").read_text()
    done = run_python(f"import sys; sys.modules['model'] = None\n{code}", tmp_path, "")
    assert done.returncode == 1
    assert "ImportError: this model needs xlstm-pretrain" in done.stderr and "pip install xlstm-pretrain" in done.stderr


def test_a_configuration_without_values_shows_the_defaults():
    register()
    assert transformers.AutoConfig.for_model("xlstm_pretrain").model == dataclasses.asdict(ModelConfig())


@pytest.mark.parametrize("name", ["hybrid", "attention"])
def test_a_new_model_begins_as_ours_does(name, exported):
    config = transformers.AutoConfig.from_pretrained(exported(name)[1])
    torch.manual_seed(3)
    begun, expected = transformers.AutoModelForCausalLM.from_config(config).model, random_model(CONFIGS[name])
    initialise(expected, seed=3)
    found = dict(begun.named_parameters())
    assert all(torch.equal(found[key], parameter) for key, parameter in expected.named_parameters())
