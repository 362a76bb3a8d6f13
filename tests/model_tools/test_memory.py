"""Memory from the configuration against what the modules really keep and carry."""

import dataclasses

import pytest
import torch

from conf import compose
from model.config import ModelOnlyConfig
from model.hardware import Hardware
from model.memory import activation_bytes, state_bytes, training_state_bytes
from tests.model_tools.small_models import CONFIGS, random_model

# Wide enough that activations outweigh the copies of weights that a CPU's kernels also keep.
BATCH, LENGTH = 8, 128
FP32 = Hardware(compute_bytes=4)
ACTIVATION_CONFIGS = {name: CONFIGS[name] for name in ("mlstm", "hybrid", "attention", "neurips")}


def kept_bytes(model, blocks, x, document_start):
    """Bytes of all distinct tensors that autograd keeps for the backward pass of `blocks`, weights excepted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept.setdefault(storage.data_ptr(), (storage.nbytes(), tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for block in blocks:
            x, _ = block(x, document_start, activation_checkpointing=model.activation_checkpointing)
        x = model.out_norm(x)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", ACTIVATION_CONFIGS.values(), ids=ACTIVATION_CONFIGS)
def test_activations_are_those_that_the_blocks_keep(config, dtype):
    model = random_model(config).to(dtype)
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    document_start = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    document_start[:, 0] = True
    kept = kept_bytes(model, model.blocks, model.embedding(tokens), document_start)
    no_logits = dataclasses.replace(config, vocab_size=0)
    estimate = activation_bytes(no_logits, BATCH, LENGTH, hardware=Hardware(compute_bytes=dtype.itemsize))
    # A CPU's rms_norm keeps two fp32 tensors where a GPU's keeps its input.
    norms = 0
    if config.family == "xlstm_7b":
        norms = (2 * config.n_blocks + 1) * BATCH * LENGTH * config.d_model * (4 if dtype == torch.float32 else 6)
    assert estimate + norms == pytest.approx(kept, rel=0.08)


@pytest.mark.parametrize("mode", ["unit", "block"])
def test_checkpointing_keeps_the_inputs_of_units_or_blocks(mode):
    config = CONFIGS["mlstm"]
    model = random_model(config)
    model.activation_checkpointing = mode
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    kept = kept_bytes(model, model.blocks, model.embedding(tokens), None)
    per_input = 4 * BATCH * LENGTH * config.d_model
    inputs = config.n_blocks * (2 if mode == "unit" else 1)
    out_norm = 2 * per_input
    assert kept == pytest.approx((inputs + 2) * per_input, rel=0.05)
    one_block = dataclasses.replace(config, n_blocks=1, vocab_size=0)
    largest = activation_bytes(one_block, BATCH, LENGTH, "none", hardware=FP32) - out_norm
    if mode == "unit":
        largest -= 4 * (2 * config.d_model + 4 * config.ffn_dim) * BATCH * LENGTH
    no_logits = dataclasses.replace(config, vocab_size=0)
    estimate = activation_bytes(no_logits, BATCH, LENGTH, mode, hardware=FP32)
    assert estimate == inputs * per_input + largest + out_norm


def test_logits_in_work_are_bounded_by_the_chunk_of_the_loss():
    config = CONFIGS["mlstm"]
    no_logits = dataclasses.replace(config, vocab_size=0)
    for tokens, held in ((512, 512), (65536, 2048)):
        logits = activation_bytes(config, 1, tokens) - activation_bytes(no_logits, 1, tokens)
        assert logits == 10 * config.vocab_size * held


def test_unknown_checkpointing_mode():
    with pytest.raises(ValueError, match="activation_checkpointing: unknown mode 'full'; choose one of none, unit"):
        activation_bytes(CONFIGS["mlstm"], 1, 16, "full")


def test_training_state_follows_the_zero_paper():
    config = compose(ModelOnlyConfig, "model_only", ["model=xlstm_7b"]).model
    # arXiv 1910.02054, figure 1: 7.5B parameters, 64 devices, 2-byte gradients: 120, 31.4, 16.6, 1.9 GB.
    per_parameter = [
        training_state_bytes(config, stage, ranks=64, gradient_bytes=2).total / 6_865_424_896 for stage in range(4)
    ]
    assert [round(7.5 * value, 1) for value in per_parameter] == [120.0, 31.4, 16.6, 1.9]
    assert training_state_bytes(config, 1, ranks=8).gradients == 4 * 6_865_424_896


def test_training_state_refuses_what_does_not_exist():
    with pytest.raises(ValueError, match="zero_stage must be 0, 1, 2 or 3, not 4"):
        training_state_bytes(CONFIGS["mlstm"], 4, ranks=1)
    with pytest.raises(ValueError, match="ranks must be at least 1, not 0"):
        training_state_bytes(CONFIGS["mlstm"], 1, ranks=0)


def test_recurrent_state_of_the_7b_is_the_published_one():
    config = compose(ModelOnlyConfig, "model_only", ["model=xlstm_7b"]).model
    assert state_bytes(config) == 134_480_896
    assert state_bytes(config, context=100_000) == 134_480_896


@pytest.mark.parametrize("name", CONFIGS)
def test_state_bytes_are_those_of_the_state_that_a_bf16_model_carries(name):
    config, length = CONFIGS[name], 7
    model = random_model(config).to(torch.bfloat16)
    with torch.no_grad():
        state = model(torch.zeros(1, length, dtype=torch.int64), return_state=True).state
    sizes = []
    state.map(lambda tensor: sizes.append(tensor.nbytes if tensor.is_floating_point() else 0) or tensor)
    assert sum(sizes) == state_bytes(config, context=length)
