"""Export to and import from transformers' xLSTM, with random weights in every tensor on either side."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import initialization as transformers_initialization

import model.huggingface.exporting as exporting
from model.config import MLSTMConfig, ModelConfig
from model.huggingface import HuggingFaceError, export_huggingface, import_huggingface, inexpressible
from model.language_model import LanguageModel
from model.presets import preset, preset_names
from model.weights import WeightsError, save_model
from tests.documented import quoted, table
from tests.model_tools.small_models import CONFIGS, random_model
from tests.runs import PATIENCE

CONFIG = CONFIGS["mlstm"]
REPOSITORY = Path(__file__).resolve().parents[2]
# Shorter than a chunk, one token, whole chunks, and more than a chunk with a rest.
LENGTHS = [1, 7, 16, 64, 75]


def tokens(length, vocab_size=96):
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(length))


def same_logits(ours, theirs, length):
    with torch.no_grad():
        difference = ours(tokens(length)).logits - theirs(tokens(length)).logits
    assert difference.abs().max() < 1e-4


def random_transformers_model(**settings):
    config = transformers.xLSTMConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "chunk_size": 16,
            "norm_eps": 1e-5,
            "eps": 1e-5,
            "gate_soft_cap": 10.0,
            "output_logit_soft_cap": 20.0,
            **settings,
        }
    )
    # Its own initialisation fails for fused weights, and leaves the feed-forward layers at zero.
    with transformers_initialization.no_init_weights():
        model = transformers.xLSTMForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(1 + 0.2 * noise if "norm" in name else scale * noise)
            if name.endswith("igate_preact.bias"):
                # As in small_models.py.
                parameter -= 5
            elif name.endswith("ifgate_preact.bias"):
                parameter[: config.num_heads] -= 5
    return model.eval()


def ours_from(directory):
    config, state_dict = import_huggingface(directory)
    model = LanguageModel(config)
    model.load_state_dict(state_dict)
    return model


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        # Widths whose factors are no round numbers: 2112 / 768 is how the published 160M is written.
        dataclasses.replace(CONFIG, d_model=192, ffn_dim=528, mlstm=MLSTMConfig(n_heads=2, qk_dim_factor=1 / 3)),
        dataclasses.replace(CONFIG, d_model=192, ffn_dim=251, norm_eps=1e-5, mlstm=MLSTMConfig(4, 1 / 3, 2 / 3,
                            gate_soft_cap=9.0, head_norm_eps=1e-5, cell_eps=1e-4)),
        dataclasses.replace(CONFIG, tie_embeddings=True, logit_soft_cap=11.0),
    ],
    ids=["plain", "factors", "every setting", "tied"],
)  # fmt: skip
def test_export_gives_the_same_logits_in_transformers(tmp_path, config):
    model = random_model(config)
    export_huggingface(model, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for length in LENGTHS:
        same_logits(model, theirs, length)


def test_export_decodes_in_transformers_with_its_cache(tmp_path):
    model = random_model(CONFIG)
    export_huggingface(model, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = tokens(21)
    with torch.no_grad():
        generated = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        step, state, expected = prompt, None, []
        for _ in range(12):
            output = model(step, state=state, return_state=True)
            step, state = output.logits[:, -1:].argmax(-1), output.state
            expected.append(step)
    assert torch.equal(generated[:, 21:], torch.cat(expected, dim=1))


def test_export_from_a_weights_directory_in_shards(tmp_path, monkeypatch):
    model = random_model(CONFIG)
    save_model(model, CONFIG, tmp_path / "weights")
    monkeypatch.setattr(exporting, "SHARD_BYTES", 200_000)
    export_huggingface(tmp_path / "weights", tmp_path / "out", dtype=torch.bfloat16)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    config, state_dict = import_huggingface(tmp_path / "out")
    assert config == CONFIG
    for name, parameter in model.named_parameters():
        assert torch.equal(state_dict[name], parameter.to(torch.bfloat16))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16


def test_round_trip_is_bitwise(tmp_path):
    model = random_model(CONFIG)
    export_huggingface(model, tmp_path / "out")
    config, state_dict = import_huggingface(tmp_path / "out")
    assert config == CONFIG
    parameters = dict(model.named_parameters())
    assert list(state_dict) == list(parameters)
    assert all(torch.equal(state_dict[name], parameters[name]) for name in parameters)


@pytest.mark.parametrize("mode", ["single", "fused"])
@pytest.mark.parametrize("factor", [2.667, 1.7])
def test_import_gives_the_same_logits(tmp_path, mode, factor):
    theirs = random_transformers_model(weight_mode=mode, ffn_proj_factor=factor, qk_dim_factor=0.5, v_dim_factor=2.0)
    theirs.save_pretrained(tmp_path)
    ours = ours_from(tmp_path)
    for length in LENGTHS:
        same_logits(ours, theirs, length)


def test_import_of_bf16_shards(tmp_path):
    theirs = random_transformers_model().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="150KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    _, state_dict = import_huggingface(tmp_path)
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.bfloat16}
    same_logits(ours_from(tmp_path), theirs.float(), 75)


def test_import_of_the_older_names(tmp_path):
    theirs = random_transformers_model(norm_eps=1e-6, eps=1e-6)
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for new, old in {"hidden_size": "embedding_dim", "num_hidden_layers": "num_blocks"}.items():
        values.pop(new)
        assert old in values
    values.update(head_dim=32, igate_bias_init_range=-7.0, cell_norm_eps=1e-6)
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    ours = ours_from(tmp_path)
    assert ours.config.mlstm.igate_bias_init == -7.0
    same_logits(ours, theirs, 40)


def test_export_refuses_with_every_reason_at_once(tmp_path):
    config = dataclasses.replace(
        CONFIGS["hybrid"],
        logit_soft_cap=None,
        mlstm=MLSTMConfig(4, 0.25, 0.75, gate="sigmoid", normaliser=False, gate_soft_cap=None, head_norm_eps=1e-5),
    )
    with pytest.raises(HuggingFaceError) as refused:
        export_huggingface(random_model(config), tmp_path / "out")
    text = str(refused.value)
    for part in (
        "slstm blocks at [1]",
        "attention blocks at [2]",
        "model.logit_soft_cap=null",
        "model.mlstm.gate=sigmoid",
        "model.mlstm.normaliser=false",
        "model.mlstm.gate_soft_cap=null",
        "model.mlstm.head_norm_eps=1e-05 differs from model.norm_eps=1e-06",
        "model.mlstm.qk_dim_factor gives a width of 32",
        "model.mlstm.v_dim_factor gives a width of 96",
    ):
        assert part in text
    assert len(refused.value.reasons) == 9
    with pytest.raises(HuggingFaceError, match="family=neurips: only the block of the 7B family"):
        export_huggingface(random_model(CONFIGS["neurips"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_that_differs_in_transformers_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    model = random_model(CONFIG)
    original = exporting.huggingface_config
    monkeypatch.setattr(
        exporting, "huggingface_config", lambda *arguments: original(*arguments) | {"gate_soft_cap": 14.0}
    )
    with pytest.raises(HuggingFaceError, match=r"logits differ by .*, more than 0\.0001"):
        export_huggingface(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_taken_directory_and_damaged_weights(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export_huggingface(random_model(CONFIG), tmp_path)
    with pytest.raises(WeightsError, match=r"model\.json does not exist"):
        export_huggingface(tmp_path, tmp_path / "out")


def test_import_names_what_is_wrong(tmp_path):
    with pytest.raises(HuggingFaceError, match=r"config\.json does not exist"):
        import_huggingface(tmp_path)
    random_transformers_model().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good, tensors = json.loads(config.read_text()), load_file(weights)
    config.write_text(json.dumps(good | {"model_type": "gpt2"}))
    with pytest.raises(HuggingFaceError, match="model_type is 'gpt2', not llama or xlstm or xlstm_pretrain"):
        import_huggingface(tmp_path)
    config.write_text(json.dumps(good | {"add_out_norm": False, "use_bias": True, "weight_mode": "odd"}))
    with pytest.raises(HuggingFaceError) as refused:
        import_huggingface(tmp_path)
    assert len(refused.value.reasons) == 3
    config.write_text(json.dumps(good))
    missing = {name: tensor for name, tensor in tensors.items() if "blocks.1.norm_ffn" not in name}
    save_file(missing | {"extra": torch.zeros(1)}, weights)
    with pytest.raises(HuggingFaceError, match=r"blocks\.1\.norm_ffn\.weight is missing\n  - tensor extra is unknown"):
        import_huggingface(tmp_path)
    save_file(tensors | {"backbone.blocks.1.ffn.proj_up.weight": torch.zeros(5, 128)}, weights)
    with pytest.raises(HuggingFaceError, match=r"proj_up\.weight has shape \[5, 128\] instead of"):
        import_huggingface(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(HuggingFaceError, match="damaged or cut short"):
        import_huggingface(tmp_path)
    weights.unlink()
    with pytest.raises(HuggingFaceError, match=r"model\.safetensors does not exist"):
        import_huggingface(tmp_path)


def test_import_of_a_head_that_is_not_there(tmp_path):
    """Only a configuration that says so ties the head to the embedding; else the head was lost."""
    random_transformers_model().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, weights)
    with pytest.raises(HuggingFaceError, match=r"tensor lm_head\.weight is missing"):
        import_huggingface(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    ours, state_dict = import_huggingface(tmp_path)
    assert ours.tie_embeddings and "lm_head.weight" not in state_dict


def test_import_of_a_lost_shard(tmp_path):
    random_transformers_model().save_pretrained(tmp_path, max_shard_size="150KB")
    next(tmp_path.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(HuggingFaceError, match=r"model-00002-of-.*\.safetensors does not exist"):
        import_huggingface(tmp_path)


def test_without_transformers_import_works_and_export_says_what_to_install(tmp_path):
    random_transformers_model().save_pretrained(tmp_path / "theirs")
    code = f"""
import sys
sys.modules["transformers"] = None
from model.huggingface import import_huggingface, export_huggingface
from model.language_model import LanguageModel
config, state_dict = import_huggingface({str(tmp_path / "theirs")!r})
model = LanguageModel(config)
model.load_state_dict(state_dict)
export_huggingface(model, {str(tmp_path / "unverified")!r}, verify=False)
try:
    export_huggingface(model, {str(tmp_path / "out")!r})
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'xlstm-pretrain[huggingface]'" in done.stdout
    assert (tmp_path / "unverified" / "model.safetensors").is_file()
    assert not (tmp_path / "out").exists()


def test_presets_of_one_kind_of_blocks_can_be_exported_as_the_page_says():
    rows = table("model.md", "blocks")
    said = {name for row in rows for name in quoted(row[-1])}
    assert {"tiny_mlstm", "tiny_llama"} <= said
    can = {name for name in preset_names() if inexpressible(preset(name)) == []}
    assert can == said


def test_published_config_of_the_7b_fits():
    """The parameters of the published 7B have the names and shapes that ours map to."""
    config = ModelConfig(mlstm=MLSTMConfig())
    values = exporting.huggingface_config(config, torch.float32, None)
    values = {key: value for key, value in values.items() if key not in ("architectures", "model_type", "dtype")}
    with torch.device("meta"):
        theirs = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**values))
        ours = LanguageModel(config)
    their_shapes = {name: parameter.shape for name, parameter in theirs.named_parameters()}
    assert len(their_shapes) == 483
    layout = exporting.format_for(config).tensor_layout([name for name, _ in ours.named_parameters()], {})
    our_shapes = {name: parameter.shape for name, parameter in ours.named_parameters()}
    assert {name: our_shapes[mine] for name, [mine] in layout.items()} == their_shapes


def test_an_index_names_files_of_its_own_directory(tmp_path):
    directory = tmp_path / "models--x--y" / "snapshots" / "rev"
    random_transformers_model().save_pretrained(directory, max_shard_size="150KB")
    index = directory / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    tensor, file = next(iter(whole["weight_map"].items()))
    for name, why in {
        "../../other.safetensors": "a path with '..'",
        "/etc/hostname": "an absolute path",
        7: "which is no text",
    }.items():
        index.write_text(json.dumps({"weight_map": {**whole["weight_map"], tensor: name}}))
        with pytest.raises(HuggingFaceError) as error:
            import_huggingface(directory)
        assert f"{index}: weight_map.{tensor} is {name!r}, {why}" in str(error.value)
    for damaged in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": []}}', "\0"):
        index.write_text(damaged)
        with pytest.raises(HuggingFaceError, match="its weight_map cannot be read"):
            import_huggingface(directory)
    index.write_text(json.dumps(whole))
    # As the cache of huggingface_hub links, and as nobody else may.
    blob = tmp_path / "models--x--y" / "blobs" / "0123abc"
    blob.parent.mkdir()
    (directory / file).rename(blob)
    (directory / file).symlink_to("../../blobs/0123abc")
    import_huggingface(directory)
    (directory / file).unlink()
    (directory / file).symlink_to(blob)
    import_huggingface(shutil.copytree(directory, tmp_path / "local", symlinks=True))
    (directory / file).unlink()
    blob.rename(tmp_path / "elsewhere")
    (directory / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HuggingFaceError, match="a link out of its folder, to "):
        import_huggingface(directory)
    (directory / file).unlink()
    os.mkfifo(directory / file)
    with pytest.raises(HuggingFaceError, match="which is a named pipe"):
        import_huggingface(directory)
