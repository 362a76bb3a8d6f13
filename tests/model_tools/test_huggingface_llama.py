"""Export to and import from transformers' Llama, with random weights in every tensor on either side."""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model import load
from model.__main__ import main
from model.config import AttentionConfig
from model.huggingface import HuggingFaceError, export_huggingface, import_huggingface
from model.locate import locate
from model.weights import save_model
from tests.marking import mark_checkpoint
from tests.model_tools.small_models import CONFIGS, random_model

# Grouped queries, a head of its own, and a base of the rotary frequencies that is no default.
CONFIG = dataclasses.replace(
    CONFIGS["attention"],
    tie_embeddings=False,
    norm_eps=1e-5,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, rope_theta=1234.0),
)
TOKENS = torch.randint(96, (2, 150), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_same_logits(ours, theirs):
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.fixture
def theirs():
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=1234.0, initializer_range=0.09, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("config", [CONFIG, CONFIGS["attention"]], ids=["grouped queries", "tied"])
def test_export_gives_the_same_logits_in_llama(tmp_path, config):
    model = random_model(config)
    assert export_huggingface(model, tmp_path / "out", sequence_length=512) == []
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(theirs) is transformers.LlamaForCausalLM
    assert theirs.config.max_position_embeddings == 512
    assert_same_logits(model, theirs)
    tied = theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    assert tied == config.tie_embeddings == ("lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors"))


def test_export_decodes_in_llama_with_its_cache(tmp_path):
    model = random_model(CONFIG)
    export_huggingface(model, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        generated = theirs.generate(TOKENS[:, :9], max_new_tokens=5, do_sample=False, eos_token_id=None)
        whole = model(generated[:, :-1]).logits.argmax(-1)
    assert torch.equal(generated[:, 9:], whole[:, 8:])


def test_attention_that_a_llama_has_not_is_refused_with_every_reason(tmp_path):
    attention = dataclasses.replace(CONFIG.attention, positions="none", window=16, sinks=True)
    with pytest.raises(HuggingFaceError) as refused:
        export_huggingface(random_model(dataclasses.replace(CONFIG, attention=attention)), tmp_path / "out")
    assert refused.value.reasons == [
        "model.attention.positions=none: positions are always rotary there",
        "model.attention.window=16: attention sees all earlier tokens there",
        "model.attention.sinks=true: the softmax has no sinks there",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [CONFIG, CONFIGS["attention"]], ids=["untied", "tied"])
def test_a_round_trip_is_bitwise_and_loads(tmp_path, config):
    model = random_model(config)
    export_huggingface(model, tmp_path / "out", verify=False)
    found, state_dict = import_huggingface(tmp_path / "out")
    assert found == config
    assert all(torch.equal(state_dict[name], parameter) for name, parameter in model.named_parameters())
    assert torch.equal(load(tmp_path / "out")(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("release", ["today's", "first"])
def test_import_of_a_llama_gives_the_same_logits(tmp_path, theirs, release):
    theirs.save_pretrained(tmp_path)
    if release == "first":
        path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
        values = json.loads(path.read_text())
        for key in ("head_dim", "attention_bias", "mlp_bias", "rope_parameters"):
            del values[key]
        path.write_text(json.dumps(values | {"rope_theta": 1234.0, "rope_scaling": None}))
        save_file(load_file(weights) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}, weights)
    assert_same_logits(load(tmp_path), theirs)


def test_what_our_models_have_not_is_refused_with_every_reason(tmp_path, theirs):
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    odd = {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "head_dim": 64}
    path.write_text(json.dumps(good | odd | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}))
    with pytest.raises(HuggingFaceError) as refused:
        import_huggingface(tmp_path)
    assert refused.value.reasons == [
        "attention_bias is true: our linear maps have no biases",
        "mlp_bias is true: our linear maps have no biases",
        "hidden_act is 'gelu', not 'silu'",
        "4 heads of head_dim 64 do not make up hidden_size 128",
        "rotary frequencies of type 'llama3': ours are never scaled",
    ]
    path.write_text(json.dumps(good))
    (tmp_path / "model.safetensors").unlink()
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(HuggingFaceError, match=r"does not hold a Llama:\n  - tensor model\.embed_tokens\.weight is"):
        import_huggingface(tmp_path)


def test_a_soft_cap_and_blocks_of_another_kind_are_refused(tmp_path):
    capped = dataclasses.replace(CONFIG, logit_soft_cap=30.0)
    with pytest.raises(HuggingFaceError, match=r"Llama format cannot .*:\n  - model\.logit_soft_cap=30\.0"):
        export_huggingface(random_model(capped), tmp_path / "out")
    with pytest.raises(HuggingFaceError, match=r"xLSTM format cannot .*:\n  - slstm blocks at \[1\]"):
        export_huggingface(random_model(CONFIGS["hybrid"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_longest_text_is_a_sample_of_the_run(tmp_path):
    weights = tmp_path / "run" / "checkpoints" / "step-00000002" / "weights"
    save_model(random_model(CONFIG), CONFIG, weights)
    mark_checkpoint(weights.parent)
    assert locate(tmp_path / "run").sequence_length is None
    (tmp_path / "run" / "config.yaml").write_text("training:\n  sequence_length: 77\n")
    assert locate(tmp_path / "run").sequence_length == 77
    assert main(["export", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'out'}", "verify=false"]) == 0
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 77
