import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kernels.mlstm import CellSettings, cell_inputs, mlstm_statistics
from kernels.mlstm.reference import mlstm_recurrent
from kernels.slstm import slstm
from model import statistics
from model.layers import mlstm_cell
from model.norms import LayerNorm, RMSNorm
from model.statistics import Statistics, record, recording


def values_of(model, batch) -> dict[str, torch.Tensor]:
    with recording() as recorded:
        model(**batch)
    return {name: value for name, (_, value) in recorded.values().items()}


def inputs_of(module, model, batch) -> list[torch.Tensor]:
    """What `module` takes first and returns in a forward pass."""
    seen = []
    handle = module.register_forward_hook(lambda m, inputs, output: seen.extend((inputs[0], output)))
    model(**batch)
    handle.remove()
    return seen


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double().square().mean().sqrt().float()


def test_names(small_configs, make_model, make_batch):
    block = {"mixer_norm.input_rms", "mixer_norm.output_rms", "ffn_norm.input_rms", "ffn_norm.output_rms", "output_rms"}
    gates = {
        f"mixer.{gate}gate_{key}"
        for gate in "if"
        for key in ("preact_min", "preact_max", "preact_mean", "soft_cap_saturation")
    }
    cell = {"mixer.stabiliser_min", "mixer.stabiliser_max"}
    expected = {f"blocks.00.{name}" for name in block | gates | cell | {"mixer.normaliser_floor_fraction"}}
    expected |= {f"blocks.01.{name}" for name in block | gates | cell}
    expected |= {f"blocks.02.{name}" for name in block}
    expected |= {"out_norm.input_rms", "out_norm.output_rms", "logits.max", "logits.soft_cap_saturation"}
    assert set(values_of(make_model(small_configs["hybrid"]), make_batch())) == expected


def test_names_without_caps_and_feed_forward(small_configs, make_model, make_batch):
    names = set(values_of(make_model(small_configs["neurips_mlstm"]), make_batch()))
    assert "blocks.00.mixer.igate_preact_max" in names and "blocks.00.mixer.normaliser_floor_fraction" in names
    assert not [name for name in names if "saturation" in name or "ffn_norm" in name]


def test_reductions_follow_the_names(small_configs, make_model, make_batch):
    with recording() as recorded:
        make_model(small_configs["hybrid"])(**make_batch())
    for name, (reduction, value) in recorded.values().items():
        ending = name.rpartition("_")[2].rpartition(".")[2]
        assert reduction == (ending if ending in ("min", "max") else "mean"), name
        assert value.dtype == torch.float32 and value.shape == () and value.isfinite() and not value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_gates_cell_and_blocks_of_the_7b_kind(small_configs, make_model, make_batch, dtype):
    model, batch = make_model(small_configs["mlstm"], dtype), make_batch()
    mixer = model.blocks[1].mixer
    with torch.no_grad():
        mixer.fgate.bias[1] = 20.0
    values = values_of(model, batch)
    for name in ("mixer_norm", "ffn_norm"):
        x, y = inputs_of(getattr(model.blocks[1], name), model, batch)
        torch.testing.assert_close(values[f"blocks.01.{name}.input_rms"], rms(x))
        torch.testing.assert_close(values[f"blocks.01.{name}.output_rms"], rms(y))
    _, (y, _) = inputs_of(model.blocks[1], model, batch)
    torch.testing.assert_close(values["blocks.01.output_rms"], rms(y))
    capped = {}
    for gate in ("igate", "fgate"):
        _, uncapped = inputs_of(getattr(mixer, gate), model, batch)
        capped[gate] = 15 * torch.tanh(uncapped / 15)
        torch.testing.assert_close(values[f"blocks.01.mixer.{gate}_preact_min"], capped[gate].min())
        torch.testing.assert_close(values[f"blocks.01.mixer.{gate}_preact_max"], capped[gate].max())
        torch.testing.assert_close(values[f"blocks.01.mixer.{gate}_preact_mean"], capped[gate].mean())
        saturation = (uncapped.abs() > 12).float().mean()
        torch.testing.assert_close(values[f"blocks.01.mixer.{gate}_soft_cap_saturation"], saturation)
    assert values["blocks.01.mixer.fgate_soft_cap_saturation"] == 0.5
    q, k = (inputs_of(getattr(mixer, name), model, batch)[1].unflatten(-1, (2, -1)) for name in ("q_proj", "k_proj"))
    cell = mlstm_statistics(q, k, capped["igate"], capped["fgate"], document_start=batch["document_start"])
    for name, value in cell.items():
        torch.testing.assert_close(values[f"blocks.01.mixer.{name}"], value)


def test_logits(small_configs, make_model, make_batch):
    model, batch = make_model(small_configs["mlstm"], torch.float32), make_batch(length=80)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    values = values_of(model, batch)
    logits = model(batch["tokens"], document_start=batch["document_start"]).logits[0, :64]
    torch.testing.assert_close(values["logits.max"], logits.max())
    uncapped = 30 * torch.atanh(logits.double() / 30)
    saturated = (uncapped.abs() > 24).float().mean()
    assert saturated > 0.01
    torch.testing.assert_close(values["logits.soft_cap_saturation"], saturated)


@pytest.mark.parametrize("cap", [15.0, None])
def test_slstm_gates_include_the_recurrent_part(small_configs, make_model, make_batch, cap):
    name = "slstm" if cap else "neurips_mlstm_and_slstm"
    model, batch = make_model(small_configs[name]), make_batch()
    index = small_configs[name].block_kinds().index("slstm")
    mixer = model.blocks[index].mixer
    values = values_of(model, batch)
    parts = [inputs_of(getattr(mixer, f"{gate}gate_proj"), model, batch)[1] for gate in "ifzo"]
    gates_x = torch.stack(parts, dim=2).unflatten(-1, (2, 16)) + mixer.bias
    # Token by token with the state of the token before: the gates and the stabiliser by their definitions.
    state, gates, stabilisers = None, [], []
    for token in range(batch["tokens"].shape[1]):
        start = bool(batch["document_start"][0, token])
        h = gates_x.new_zeros(2, 16) if start or state is None else state.h[0]
        gate = gates_x[0, token] + torch.einsum("hi,higo->gho", h, mixer.recurrent_kernel)
        gates.append(gate[:2])
        _, state = slstm(
            gates_x[:1, token : token + 1],
            mixer.recurrent_kernel,
            document_start=batch["document_start"][:1, token : token + 1],
            initial_state=state,
            return_state=True,
            gate_soft_cap=cap,
        )
        stabilisers.append(state.m[0])
    uncapped, stabiliser = torch.stack(gates, dim=1), torch.stack(stabilisers)
    capped = uncapped if cap is None else cap * torch.tanh(uncapped / cap)
    prefix = f"blocks.{index:02d}.mixer."
    for slot, gate in enumerate(("igate", "fgate")):
        torch.testing.assert_close(values[f"{prefix}{gate}_preact_max"], capped[slot].max().float())
        torch.testing.assert_close(values[f"{prefix}{gate}_preact_min"], capped[slot].min().float())
        torch.testing.assert_close(values[f"{prefix}{gate}_preact_mean"], capped[slot].mean().float())
    torch.testing.assert_close(values[f"{prefix}stabiliser_max"], stabiliser.max().float())
    torch.testing.assert_close(values[f"{prefix}stabiliser_min"], stabiliser.min().float())


def test_slstm_statistics_start_from_the_incoming_state(small_configs, make_model, make_batch):
    model, tokens = make_model(small_configs["slstm"]), make_batch()["tokens"]
    with recording() as recorded:
        model(tokens)
    whole = {name: value for name, (_, value) in recorded.values().items()}
    state, pieces = None, []
    for start in range(0, tokens.shape[1], 10):
        with recording() as recorded:
            state = model(tokens[:, start : start + 10], state=state, return_state=True).state
        pieces.append({name: value for name, (_, value) in recorded.values().items()})
    for gate in ("igate_preact_max", "fgate_preact_max", "stabiliser_max"):
        largest = max(piece[f"blocks.01.mixer.{gate}"] for piece in pieces)
        torch.testing.assert_close(whole[f"blocks.01.mixer.{gate}"], largest)


def test_slstm_stabiliser_of_one_decoded_token(small_configs, make_model, make_batch):
    model, tokens = make_model(small_configs["slstm"]), make_batch()["tokens"]
    state = model(tokens[:, :20], return_state=True).state
    with recording() as recorded:
        after = model(tokens[:, 20:21], state=state, return_state=True).state
    values = recorded.values()
    for index, block in enumerate(after.blocks):
        stabiliser = block.cell.m[0].detach().float()
        # Some units keep what they carry, so that their stabiliser is above the present input gate.
        assert stabiliser.max() > values[f"blocks.{index:02d}.mixer.igate_preact_max"][1]
        torch.testing.assert_close(values[f"blocks.{index:02d}.mixer.stabiliser_min"][1], stabiliser.min())
        torch.testing.assert_close(values[f"blocks.{index:02d}.mixer.stabiliser_max"][1], stabiliser.max())


def test_recording_does_not_change_losses_and_gradients(config, make_model, make_batch):
    model, batch = make_model(config, torch.float32), make_batch()
    results = []
    for switch in (False, True):
        model.zero_grad()
        if switch:
            with recording() as recorded:
                losses = model(**batch).token_losses
            assert recorded.values()
        else:
            losses = model(**batch).token_losses
        losses.sum().backward()
        results.append((losses, [parameter.grad.clone() for parameter in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(off, on) for off, on in zip(results[0][1], results[1][1], strict=True))


def test_nothing_is_computed_while_off(small_configs, make_model, make_batch):
    record("never", "mean", lambda: pytest.fail("called without a recording"))
    model, batch = make_model(small_configs["hybrid"]), make_batch()
    with recording() as recorded:
        pass
    model(**batch)
    assert recorded.values() == {} and not statistics.is_recording()
    with recording() as recorded, statistics.paused():
        model(**batch)
    assert recorded.values() == {}


def test_a_recording_ends_with_an_error():
    with pytest.raises(KeyError), recording():
        raise KeyError
    assert not statistics.is_recording()


def test_micro_batches_are_combined(small_configs, make_model, make_batch):
    model, batch = make_model(small_configs["mlstm"], torch.float32), make_batch()
    halves = [{key: value[row : row + 1] for key, value in batch.items()} for row in (0, 1)]
    separate = [values_of(model, half) for half in halves]
    with recording() as recorded:
        for half in halves:
            model(**half)
    for name, (reduction, value) in recorded.values().items():
        both = torch.stack([values[name] for values in separate])
        torch.testing.assert_close(value, getattr(both, reduction)())


def test_reduction_of_repeated_records():
    recorded = Statistics()
    for value in (1.0, 5.0, 3.0):
        for reduction in ("mean", "min", "max"):
            recorded.add(reduction, reduction, torch.tensor(value))
    assert {name: value.item() for name, (_, value) in recorded.values().items()} == {"mean": 3, "min": 1, "max": 5}


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_bfloat16_norms_reduce_in_float32(norm):
    layer = norm(512, 1e-6, "norm")
    with torch.no_grad():
        layer.weight.copy_(torch.randn(512, generator=torch.Generator().manual_seed(0)))
    x = 3 + 5 * torch.randn(4, 7, 512, generator=torch.Generator().manual_seed(1))
    layer, x = layer.bfloat16(), x.bfloat16()
    exact = layer.double()(x.double())
    rounded = layer.bfloat16()(x)
    assert rounded.dtype == torch.bfloat16
    # Half a unit in the last place of bfloat16, and nothing from the sums.
    assert ((rounded.double() - exact).abs() <= exact.abs() * 2**-8).all()
    mixed = layer.float()(x)
    assert mixed.dtype == torch.bfloat16 and F.mse_loss(mixed.double(), exact) < 1e-4


def profiles_of(model, batch) -> dict[str, torch.Tensor]:
    with recording() as recorded:
        model(**batch)
    return recorded.profiles()


def slow_memory_tokens(forget_preact: list[float]) -> float:
    """By its definition: gate by gate, how many steps of the mean rate take what is kept to 1/e."""
    rates = [-math.log(1 / (1 + math.exp(-f))) for f in forget_preact]
    return 1 / (sum(rates) / len(rates))


@pytest.mark.parametrize("kind", ["mlstm", "neurips_mlstm"])
def test_memory_lengths_histograms_and_state_norms_follow_their_definitions(
    small_configs, make_model, make_batch, kind
):
    model, batch = make_model(small_configs[kind]), make_batch(length=70)
    batch["document_start"][0] = False
    batch["document_start"][0, [0, 40]] = True
    mixer, settings = model.blocks[1].mixer, model.blocks[1].mixer.cell
    with torch.no_grad():
        mixer.fgate.bias[1] = 4.0
    profiles = profiles_of(model, batch)
    inputs = []
    cell = mlstm_cell.record_memory
    with pytest.MonkeyPatch.context() as patch, recording():
        patch.setattr(mlstm_cell, "record_memory", lambda name, *rest: (inputs.append(rest[1]), cell(name, *rest)))
        model(**batch)
    x = inputs[1]
    for head in range(settings.heads):
        expected = slow_memory_tokens(x.fgate_preact[..., head].flatten().tolist())
        found = statistics.memory_tokens(float(profiles["blocks.01.mixer.forget_rate"][head]))
        assert found == pytest.approx(expected, rel=1e-5)
    borders = [-math.inf, *statistics.HISTOGRAM_EDGES, math.inf]
    for gate, values in (("igate", x.igate_preact), ("fgate", x.fgate_preact)):
        counts = [((values >= low) & (values < high)).sum() for low, high in itertools.pairwise(borders)]
        expected = torch.stack(counts) / values.numel()
        torch.testing.assert_close(profiles[f"blocks.01.mixer.{gate}_histogram"], expected)
    # Token by token, by the recurrence.
    q, k, v, igate, fgate = (tensor[:1].double() for tensor in x.tensors)
    for place, position in enumerate(statistics.STATE_POSITIONS):
        found = profiles["blocks.01.mixer.state_log_norm"][place]
        if position > 40:
            assert found.isnan(), "the second document begins behind 40 tokens, the sequence ends behind 70"
            continue
        first = cell_inputs(*(tensor[:, :position] for tensor in (k, v, igate, fgate)))
        _, state = mlstm_recurrent(q[:, :position], first, CellSettings(settings.gate), return_state=True)
        norms = (torch.exp(state.m)[..., None, None] * state.C).flatten(2).norm(dim=2)
        torch.testing.assert_close(found.double(), norms.log().mean(), rtol=1e-4, atol=1e-4)


def test_a_head_of_an_slstm_remembers_as_its_unit_that_forgets_least(small_configs, make_model, make_batch):
    model, batch = make_model(small_configs["slstm"]), make_batch()
    gates = []
    with pytest.MonkeyPatch.context() as patch, recording() as recorded:
        rates = statistics.forget_rates
        patch.setattr(statistics, "forget_rates", lambda gate, over: (gates.append(gate), rates(gate, over))[1])
        model(**batch)
    profile = recorded.profiles()["blocks.00.mixer.forget_rate"]
    assert gates[0].dim() == 3 and len(profile) == gates[0].shape[1]
    for head in range(len(profile)):
        units = gates[0][:, head].unbind(1)
        longest = max(slow_memory_tokens(unit.tolist()) for unit in units)
        assert statistics.memory_tokens(float(profile[head])) == pytest.approx(longest, rel=1e-5)


def test_profiles_of_micro_batches_and_of_time_chunks_are_those_of_all_tokens(small_configs, make_model, make_batch):
    model, batch = make_model(small_configs["hybrid"], torch.float32), make_batch()
    whole = profiles_of(model, batch)
    with recording() as recorded:
        for row in (0, 1):
            model(**{key: value[row : row + 1] for key, value in batch.items()})
    halves = recorded.profiles()
    # Of the first sequence alone: here of two.
    everywhere = [name for name in whole if name.startswith("blocks.00") and "norm" not in name]
    assert len(everywhere) == 3
    for name in everywhere:
        torch.testing.assert_close(halves[name], whole[name])
    chunks, state = [], None
    for part in (slice(0, 7), slice(7, None)):
        piece = {key: batch[key][:, part] for key in ("tokens", "document_start")}
        with statistics.recording(), statistics.recording_chunk(is_first=part.start == 0) as measured:
            state = model(**piece, state=state, return_state=True).state
        chunks.append((piece["tokens"].shape[1], measured))
    together = Statistics()
    together.add_chunks(chunks)
    for name in everywhere:
        torch.testing.assert_close(together.profiles()[name], whole[name])


def test_what_was_not_measured_is_left_out_of_means():
    recorded = Statistics()
    for values in ([1.0, math.nan, math.nan], [3.0, 5.0, math.nan]):
        recorded.add_profile("x", torch.tensor(values))
    assert recorded.profiles()["x"].tolist()[:2] == [2.0, 5.0] and recorded.profiles()["x"][2].isnan()
    parts = Statistics()
    parts.add_chunks([(1, recorded), (3, recorded)])
    assert parts.profiles()["x"].tolist()[:2] == [2.0, 5.0] and parts.profiles()["x"][2].isnan()
    statistics.record_profile("never", lambda: pytest.fail("called without a recording"))
    assert statistics.memory_tokens(0.0) == math.inf
