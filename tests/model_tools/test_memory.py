"""Memory from the configuration against what the modules really keep and carry."""

import dataclasses

import pytest
import torch

from conf import compose
from model.accounting import state_elements
from model.config import MLSTMConfig, ModelConfig, ModelOnlyConfig, PreUpMLSTMConfig, SLSTMConfig
from model.hardware import Hardware
from model.initialisation import initialise
from model.language_model import LanguageModel
from model.layers import feed_forward, layer_kinds
from model.memory import (
    InWork,
    activation_bytes,
    activations,
    state_bytes,
    states_between_chunks_bytes,
    training_state_bytes,
)
from model.recomputation import ACTIVATION_CHECKPOINTING
from tests.model_tools.small_models import CONFIGS, random_model

# Wide enough that activations outweigh the copies of weights that a CPU's kernels also keep.
BATCH, LENGTH = 8, 128
FP32 = Hardware(compute_bytes=4)
H200 = Hardware("NVIDIA H200")
KEPT = ("mlstm", "hybrid", "attention", "window", "mlstm_attention", "neurips")
ACTIVATION_CONFIGS = {name: CONFIGS[name] for name in KEPT}


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


GPU_CONFIGS = {
    "mlstm": ModelConfig(
        vocab_size=64, d_model=1024, n_blocks=3, ffn_dim=2752, mlstm=MLSTMConfig(n_heads=4)
    ),
    "neurips": ModelConfig(
        family="neurips", vocab_size=64, d_model=768, n_blocks=3, ffn_dim=None, preup_mlstm=PreUpMLSTMConfig()
    ),
    "slstm": ModelConfig(
        vocab_size=64, d_model=1024, n_blocks=3, block="slstm", ffn_dim=2752, slstm=SLSTMConfig(gate_soft_cap=15.0)
    ),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", GPU_CONFIGS.values(), ids=GPU_CONFIGS)
def test_activations_on_a_gpu_are_those_of_its_kernels(config, dtype, mode):
    batch, length = 4, 2048
    device = torch.device("cuda")
    with device:
        model = LanguageModel(config).to(dtype)
    initialise(model, seed=0)
    model.activation_checkpointing = mode
    tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
    document_start = torch.zeros(batch, length, dtype=torch.bool, device=device)
    document_start[:, 0] = True
    kept = kept_bytes(model, model.blocks, model.embedding(tokens), document_start)
    hardware = Hardware(torch.cuda.get_device_name(), dtype.itemsize)
    estimate = activation_bytes(dataclasses.replace(config, vocab_size=0), batch, length, mode, hardware)
    # The formula counts the input of the head, which does not run here, and its gradient.
    estimate -= 2 * batch * length * config.d_model * dtype.itemsize
    if mode != "none":
        # What lives at the peak of the backward pass is not there yet.
        kind = layer_kinds(config)[0]
        mixer = kind.activation_bytes(config, length, hardware)
        ffn = feed_forward.activation_bytes(config, hardware) if kind.has_feed_forward else 0
        estimate -= batch * length * (max(mixer, ffn) if mode == "unit" else mixer + ffn)
    assert estimate == pytest.approx(kept, rel=0.08)


def test_a_gpu_keeps_half_of_what_the_reference_keeps():
    config, length = GPU_CONFIGS["mlstm"], 8192
    reference = activation_bytes(config, 1, length)
    # Measured on an H200 in bf16: 44,749 bytes per token and block, and 4,096 for the norm before the head. Since then
    # the gates take bf16 as it is, without a copy in fp32, and the memory that enters each chunk is kept.
    chunk = config.mlstm.cell(config.d_model).chunk_tokens(H200)
    measured = 44_749 - 4 * config.d_model + 4 * 128 * (2 * 256 + 4) / chunk
    on_gpu = activation_bytes(dataclasses.replace(config, vocab_size=0), 1, length, "none", H200)
    # The gradient of the head's input the measured pass did not make.
    assert on_gpu / length - 2 * config.d_model == pytest.approx(3 * measured + 4_096, rel=0.01)
    assert 1.9 < reference / on_gpu < 2.4
    pinned = dataclasses.replace(config, mlstm=MLSTMConfig(n_heads=4, backend="reference"))
    in_blocks = activations(pinned, 1, length, "none", H200).blocks
    assert in_blocks == activations(config, 1, length).blocks - 3 * 4 * config.d_model * length


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


@pytest.mark.parametrize("config", ACTIVATION_CONFIGS.values(), ids=ACTIVATION_CONFIGS)
def test_time_chunks_keep_the_activations_of_one_chunk_and_the_state(config):
    """The state is that which the model returns, and once more for its leaving form and its gradient."""
    chunk, model = 16, random_model(config)
    tokens = torch.zeros(BATCH, chunk, dtype=torch.int64)
    sizes = []
    model.advance(tokens).map(lambda t: sizes.append(t.nbytes * t.is_floating_point()) or t)
    one = activation_bytes(config, BATCH, chunk, hardware=FP32)
    in_work = InWork(time_chunk=chunk)
    found = [activation_bytes(config, BATCH, length, hardware=FP32, in_work=in_work) for length in (chunk, 2 * chunk)]
    assert found[0] == one
    if not state_elements(config)["cache_per_token"]:
        in_blocks = state_elements(config)["window"] > 0
        # In a window, chunks behind the first one have the keys and values of the window before them too.
        assert found[1] - one == pytest.approx(3 * sum(sizes), rel=0.01) or (in_blocks and found[1] > one)
        long = activation_bytes(config, BATCH, 100 * chunk, hardware=FP32, in_work=in_work)
        assert long == pytest.approx(found[1], rel=0.01)
        assert states_between_chunks_bytes(config, BATCH, 100 * chunk - 1, chunk, 4) == 98 * sum(sizes)
        # In a pipeline each chunk whose backward pass is still to come keeps its activations and the state before it.
        kept = activation_bytes(dataclasses.replace(config, vocab_size=0), BATCH, chunk, hardware=FP32) + sum(sizes)
        if in_blocks:
            kept += found[1] - one - 3 * sum(sizes)
        in_flight = dataclasses.replace(in_work, micro_batches=5)
        five = activation_bytes(config, BATCH, 100 * chunk, hardware=FP32, in_work=in_flight)
        assert five - long == pytest.approx(4 * kept, rel=0.01)
    assert states_between_chunks_bytes(config, BATCH, 2 * chunk, chunk, 4) == 0
    assert states_between_chunks_bytes(config, BATCH, 2 * chunk, None, 4) == 0


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
