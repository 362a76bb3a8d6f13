import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model.language_model import LanguageModel, ModelOutput
from model.statistics import recording


def losses_and_gradients(model, batch):
    model.zero_grad()
    losses = model(**batch).token_losses
    losses.mean().backward()
    return losses.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=str)
@pytest.mark.parametrize("documents", [True, False])
def test_prefill_then_step_by_step_equals_one_pass(config, make_model, make_batch, dtype, tolerance, documents):
    model = make_model(config, dtype)
    batch = make_batch()
    tokens = batch["tokens"]
    start = batch["document_start"] if documents else None
    with torch.no_grad():
        whole = model(tokens, document_start=start, return_state=True)
        # A prefill of 9, stretches that end inside and at a chunk, then single tokens over a document start (19).
        pieces, state, position = [], None, 0
        for length in (9, 7, 1, 1, 1, 1, 1, 8):
            end = position + length
            output = model(
                tokens[:, position:end],
                document_start=start[:, position:end] if documents else None,
                state=state,
                return_state=True,
            )
            pieces.append(output.logits)
            state, position = output.state, end
    assert position == tokens.shape[1]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole.logits, rtol=0, atol=tolerance)
    if "attention" not in config.block_kinds():
        for ours, theirs in zip(flat(state), flat(whole.state), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def flat(state) -> list[torch.Tensor]:
    tensors = []
    state.map(lambda tensor: tensors.append(tensor) or tensor)
    return tensors


def test_gradients_flow_through_a_state(config, make_model, make_batch):
    model = make_model(config)
    batch = make_batch()
    losses, whole = losses_and_gradients(model, batch)
    model.zero_grad()
    first = {key: value[:, :13] for key, value in batch.items()}
    second = {key: value[:, 13:] for key, value in batch.items()}
    output = model(**first, return_state=True)
    (output.token_losses.sum() + model(**second, state=output.state).token_losses.sum()).div(losses.numel()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, whole[name], rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_state_is_a_value(config, make_model, make_batch):
    model = make_model(config, torch.float32)
    tokens = make_batch()["tokens"]
    state = model(tokens, return_state=True).state
    assert any(tensor.requires_grad for tensor in flat(state))
    detached = state.detach().to("cpu")
    assert not any(tensor.requires_grad for tensor in flat(detached))
    before = [tensor.clone() for tensor in flat(detached)]
    once = model(tokens[:, :3], state=detached).logits
    assert torch.equal(once, model(tokens[:, :3], state=detached).logits)
    assert all(torch.equal(old, new) for old, new in zip(before, flat(detached), strict=True))
    assert all(tensor.shape[0] == tokens.shape[0] for tensor in flat(detached))
    # Every tensor has the batch first, so that rows can be taken apart and put together.
    second_row = model(tokens[1:, :3], state=detached.map(lambda tensor: tensor[1:])).logits
    torch.testing.assert_close(second_row, once[1:], rtol=1e-5, atol=1e-5)


def test_losses_are_the_cross_entropy_of_the_logits(config, make_model, make_batch):
    model = make_model(config)
    batch = make_batch()
    batch["targets"] = batch["targets"].clone()
    batch["targets"][0, 3:6] = -100
    output = model(**batch)
    assert output.logits is None and output.state is None
    logits = model(batch["tokens"], document_start=batch["document_start"]).logits
    if config.logit_soft_cap is not None:
        assert logits.abs().max() < config.logit_soft_cap
    expected = F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")
    assert not output.token_losses[0, 3:6].any()
    torch.testing.assert_close(output.token_losses, expected, rtol=1e-10, atol=1e-12)


def test_logit_soft_cap_is_tanh(small_configs, make_model, make_batch):
    capped = make_model(small_configs["mlstm"])
    uncapped = LanguageModel(dataclasses.replace(capped.config, logit_soft_cap=None)).double()
    uncapped.load_state_dict(capped.state_dict())
    for model in (capped, uncapped):
        with torch.no_grad():
            model.lm_head.weight.mul_(20)
    tokens = make_batch()["tokens"]
    logits = uncapped(tokens).logits
    assert logits.abs().max() > 30
    torch.testing.assert_close(capped(tokens).logits, 30 * torch.tanh(logits / 30))


@pytest.mark.parametrize("mode", ["unit", "block"])
def test_activation_checkpointing_changes_nothing_but_memory(config, make_model, make_batch, mode):
    model = make_model(config)
    batch = make_batch()
    losses, gradients = losses_and_gradients(model, batch)
    saved = {"none": 0, mode: 0}

    def count(setting):
        def pack(tensor):
            saved[setting] += tensor.numel()
            return tensor

        model.activation_checkpointing = setting
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**batch).token_losses.mean()

    count("none")
    count(mode)
    assert saved[mode] < 0.6 * saved["none"]
    assert model.activation_checkpointing == mode
    recomputed_losses, recomputed_gradients = losses_and_gradients(model, batch)
    assert torch.equal(losses, recomputed_losses)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed_gradients[name], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["unit", "block"])
def test_recomputation_is_not_recorded_again(small_configs, make_model, make_batch, mode):
    model = make_model(small_configs["mlstm_and_slstm"])
    batch = make_batch()
    with recording() as plain:
        model(**batch)
    model.activation_checkpointing = mode
    with recording() as forward:
        losses = model(**batch).token_losses
    assert forward.values() == plain.values()
    with recording() as backward:
        losses.mean().backward()
    assert backward.values() == {}


def test_an_unknown_checkpointing_mode_is_refused(small_configs):
    model = LanguageModel(small_configs["mlstm"])
    with pytest.raises(ValueError, match="unknown mode 'layer'; choose one of none, unit, block"):
        model.activation_checkpointing = "layer"


def test_bfloat16_parameters_keep_gates_states_and_losses_in_float32(config, make_model, make_batch):
    model = make_model(config, torch.bfloat16)
    batch = make_batch()
    outputs = {}
    for name, module in model.named_modules():
        if name.rsplit(".")[-1] in ("igate", "fgate", "igate_proj", "fgate_proj"):
            module.register_forward_hook(lambda m, inputs, output, name=name: outputs.__setitem__(name, output.dtype))
    output = model(**batch, return_state=True)
    assert output.token_losses.dtype == torch.float32
    assert model(batch["tokens"]).logits.dtype == torch.float32
    gated = [kind for kind in config.block_kinds() if kind != "attention"]
    assert len(outputs) == 2 * len(gated) and set(outputs.values()) <= {torch.float32}
    for kind, state in zip(config.block_kinds(), output.state.blocks, strict=True):
        if kind != "attention":
            cell = getattr(state, "cell", getattr(state, "mlstm", state))
            assert all(getattr(cell, field.name).dtype == torch.float32 for field in dataclasses.fields(cell))
    output.token_losses.mean().backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())


def test_bfloat16_is_near_float64(config, make_model, make_batch):
    batch = make_batch()
    exact = make_model(config, torch.float64)
    rough = make_model(config, torch.bfloat16)
    # Both with weights that bfloat16 holds exactly: the difference is of the activations alone.
    exact.load_state_dict(rough.state_dict())
    difference = exact(**batch).token_losses - rough(**batch).token_losses
    assert difference.abs().mean() < 0.05


def test_autocast_keeps_gates_in_float32(config, make_model, make_batch):
    model = make_model(config, torch.float32)
    batch = make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch, return_state=True)
    assert output.token_losses.dtype == torch.float32
    assert (output.token_losses - model(**batch).token_losses).abs().mean() < 0.05
    output.token_losses.mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_tied_embeddings_are_one_parameter(small_configs, make_model, make_batch):
    config = small_configs["hybrid"]
    assert config.tie_embeddings
    model = make_model(config)
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert model.lm_head.weight is model.embedding.weight
    untied = LanguageModel(dataclasses.replace(config, tie_embeddings=False)).double()
    untied.load_state_dict(model.state_dict())
    batch = make_batch()
    losses, gradients = losses_and_gradients(model, batch)
    untied_losses, untied_gradients = losses_and_gradients(untied, batch)
    assert torch.equal(losses, untied_losses)
    expected = untied_gradients["embedding.weight"] + untied_gradients["lm_head.weight"]
    torch.testing.assert_close(gradients["embedding.weight"], expected, rtol=1e-12, atol=1e-14)


def test_parameter_names_of_the_7b_block(small_configs):
    names = [name for name, _ in LanguageModel(small_configs["mlstm"]).named_parameters()]
    modules = ["mixer_norm", "ffn_norm", *(f"ffn.{name}_proj" for name in ("gate", "up", "down"))]
    modules += [f"mixer.{name}" for name in ("q_proj", "k_proj", "v_proj", "output_gate", "igate", "fgate")]
    modules += ["mixer.head_norm", "mixer.out_proj"]
    block = [f"{name}.weight" for name in modules] + ["mixer.igate.bias", "mixer.fgate.bias"]
    expected = {"embedding.weight", "out_norm.weight", "lm_head.weight"}
    expected |= {f"blocks.{index}.{name}" for index in range(2) for name in block}
    assert len(block) == 15 and len(names) == 33 and set(names) == expected


def test_nothing_is_allocated_on_the_meta_device(config):
    with torch.device("meta"):
        model = LanguageModel(config)
        output = model(torch.zeros(2, 9, dtype=torch.int64), targets=torch.zeros(2, 9, dtype=torch.int64))
    assert output.token_losses.is_meta and all(parameter.is_meta for parameter in model.parameters())


TOKENS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": TOKENS[0]}, r"tokens must be a non-empty \[B, S\] int64 tensor, got int64 \(5,\)"),
        ({"tokens": TOKENS.int()}, r"tokens must be a non-empty \[B, S\] int64 tensor, got int32 \(2, 5\)"),
        ({"tokens": TOKENS[:, :0]}, r"tokens must be a non-empty .*, got int64 \(2, 0\)"),
        ({"tokens": TOKENS, "targets": TOKENS[:, :4]}, r"targets must be int64 of shape \(2, 5\), got int64 \(2, 4\)"),
        (
            {"tokens": TOKENS, "document_start": TOKENS},
            r"document_start must be bool of shape \(2, 5\), got int64 \(2, 5\)",
        ),
    ],
)
def test_unfit_inputs_are_refused(small_configs, make_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(small_configs["mlstm"])(**arguments)


def test_the_state_of_another_depth_is_refused(small_configs, make_model):
    state = make_model(small_configs["mlstm"])(TOKENS, return_state=True).state
    deeper = make_model(dataclasses.replace(small_configs["mlstm"], n_blocks=3))
    with pytest.raises(ValueError, match="state is of a model with 2 blocks, this model has 3"):
        deeper(TOKENS, state=state)


def test_an_output_not_asked_for_is_none(small_configs, make_model):
    output = make_model(small_configs["mlstm"])(TOKENS)
    assert isinstance(output, ModelOutput) and output.token_losses is None and output.state is None


def test_the_loss_sum_is_that_of_the_tokens(small_configs, make_model, make_batch):
    model, batch = make_model(small_configs["mlstm"]), make_batch()
    for z_loss_weight in (0.0, 0.1):
        output = model(**batch, loss_reduction="sum", z_loss_weight=z_loss_weight)
        assert output.token_losses is None and output.logits is None
        expected = model(**batch, z_loss_weight=z_loss_weight).token_losses
        torch.testing.assert_close(output.loss_sum, expected.sum(), rtol=1e-12, atol=0)
    assert output.loss_sum > model(**batch, loss_reduction="sum").loss_sum
    with pytest.raises(ValueError, match="loss_reduction must be one of none, sum, not 'mean'"):
        model(**batch, loss_reduction="mean")


def test_under_autocast_the_loss_multiplies_in_bfloat16(small_configs, make_model, make_batch):
    head, batch = make_model(small_configs["mlstm"], torch.float32).lm_head, make_batch()
    hidden = torch.randn(*batch["tokens"].shape, small_configs["mlstm"].d_model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = head(hidden, batch["targets"])
    assert actual.dtype == torch.float32
    assert torch.equal(actual, head(hidden.bfloat16(), batch["targets"]))
    assert not torch.equal(actual, head(hidden, batch["targets"]))
