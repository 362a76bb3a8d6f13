"""A model in three lines: what programs and notebooks import from `model`."""

import subprocess
import sys

import pytest
import torch

import model
from conf import ConfigError
from model import LanguageModel, ModelConfig, generate, load, preset
from model.config import MLSTMConfig
from model.huggingface import export_huggingface
from model.initialisation import initialise
from model.weights import WeightsError, save_model
from tests.marking import mark_checkpoint
from tests.runs import PATIENCE, ROOT, environment


def small() -> LanguageModel:
    config = preset("tiny", vocab_size=96, d_model=128, n_blocks=2, slstm_at=[], slstm=None, mlstm={"n_heads": 2})
    made = LanguageModel(config)
    initialise(made, seed=1)
    return made


def test_a_preset_is_its_file_with_values_of_ones_own():
    config = preset("xlstm_160m", n_blocks=6, mlstm={"n_heads": 2, "gate": "sigmoid"})
    assert isinstance(config, ModelConfig) and (config.n_blocks, config.d_model) == (6, 768)
    assert isinstance(config.mlstm, MLSTMConfig) and (config.mlstm.n_heads, config.mlstm.gate) == (2, "sigmoid")
    assert config.mlstm.gate_soft_cap == 15.0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("xlstm_7",), "no preset 'xlstm_7' (did you mean 'xlstm_7b'?); there are gated_deltanet_160m"),
        (("tiny", {"n_block": 3}), "n_block: no such key (did you mean 'n_blocks'?)"),
        (("tiny", {"mlstm": {"n_heads": 5}}), "model.mlstm.n_heads: 5 heads do not divide the width 96"),
    ],
)
def test_what_is_wrong_with_a_preset_is_said(arguments, expected):
    name, overrides = arguments[0], arguments[1] if len(arguments) > 1 else {}
    with pytest.raises(ConfigError) as refused:
        preset(name, **overrides)
    assert refused.value.problems[0].startswith(expected)


def test_a_run_a_checkpoint_and_weights_load_with_the_same_values(tmp_path):
    made = small()
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    save_model(made, made.config, step / "weights")
    mark_checkpoint(step)
    tokens = torch.tensor([[1, 2, 3]])
    for path in (tmp_path / "run", step, step / "weights", str(step)):
        loaded = load(path)
        assert not loaded.training and torch.equal(loaded(tokens).logits, made(tokens).logits)
    half = load(step, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_a_hugging_face_directory_loads(tmp_path):
    made = small()
    export_huggingface(made, tmp_path / "exported", verify=False)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(load(tmp_path / "exported")(tokens).logits, made(tokens).logits)


def test_the_loss_is_the_mean_of_the_scored_tokens():
    made, tokens = small(), torch.tensor([[1, 2, 3, 4]])
    targets = torch.tensor([[2, 3, -100, 5]])
    by_token = made(tokens, targets=targets)
    scored = by_token.token_losses[targets != -100]
    torch.testing.assert_close(by_token.loss, scored.mean())
    torch.testing.assert_close(made(tokens, targets=targets, loss_reduction="sum").loss, scored.mean())
    with pytest.raises(ValueError, match="no loss without targets"):
        _ = made(tokens).loss


def test_generate_continues_a_prompt():
    tokens = generate(small(), [[1, 2, 3]], max_new_tokens=4, temperature=0)
    assert tokens.shape == (1, 4)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="does not exist; name a run's directory"):
        load(tmp_path / "nothing")
    with pytest.raises(WeightsError, match="is nothing with weights; name a run's directory"):
        load(tmp_path)


def test_names_are_found_when_asked_for_and_no_others():
    assert {"LanguageModel", "ModelConfig", "generate", "load", "preset"} <= set(dir(model))
    with pytest.raises(AttributeError, match="module 'model' has no attribute 'pretrained'"):
        _ = model.pretrained


def test_the_help_and_the_package_need_no_torch():
    code = (
        "import sys, model, contextlib\n"
        "from model.__main__ import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
