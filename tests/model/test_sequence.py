"""Layers that share a sequence with other ranks compute what one rank computes. Axes: B batch, S sequence."""

import copy
import dataclasses

import pytest
import torch

from model.config import ModelConfig, SLSTMConfig
from model.layers import layer_kind, sequence_problems
from model.recomputation import ACTIVATION_CHECKPOINTING
from model.sequence import LOCAL, last_inputs
from model.state import ModelState
from tests.model.conftest import CONFIGS
from tests.model.virtual_ranks import merged, run_ranks, sums_before

LENGTH = 48
# Where documents begin: in each row others, at a border of slices, none in the whole last third of row 1.
STARTS = ((0, 3, 12, 13, 31), (0, 24))
SIZES = {
    **{name: (2, 3, 4) for name in CONFIGS if "slstm" not in name},
    **dict.fromkeys(("attention", "attention_window", "attention_nope", "mlstm_attention"), (2, 4)),
    **{name: (2,) for name in CONFIGS if "slstm" in name or name == "hybrid"},
}
CASES = [(name, size) for name, sizes in sorted(SIZES.items()) for size in sizes]


def make_windows(count: int) -> list[dict[str, torch.Tensor]]:
    """Consecutive windows of the same documents; of the second only some begin with a document."""
    generator = torch.Generator().manual_seed(5)
    windows = []
    for window in range(count):
        tokens = torch.randint(61, (2, LENGTH + 1), generator=generator)
        document_start = torch.zeros(2, LENGTH, dtype=torch.bool)
        for row, places in enumerate(STARTS):
            document_start[row, [place + 5 * window for place in places]] = True
        windows.append({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "document_start": document_start})
    return windows


def run_windows(model, windows, states=None):
    """The losses of all windows [B, S], each continued from the one before, and the last state."""
    state, losses = None, []
    for window in windows:
        tokens = window["tokens"]
        rest = {key: value for key, value in window.items() if key != "tokens"}
        output = model(tokens, **rest, state=state, return_state=True)
        losses.append(output.token_losses)
        state = output.state
    return torch.cat(losses, dim=1), state


def on_ranks(model, windows, size):
    """The losses that `size` ranks compute, in the order of time, their last states, and the exchange."""
    memo = {id(parameter): parameter for parameter in model.parameters()}

    def rank_losses(rank):
        # Each rank has modules of its own around the same parameters.
        own = copy.deepcopy(model, dict(memo))
        own.sequence = rank
        slices = [
            {k: v.chunk(size, dim=1)[rank.rank] if v is not None else None for k, v in w.items()} for w in windows
        ]
        losses, state = run_windows(own, slices)
        return losses.chunk(len(windows), dim=1), state

    results, exchange = run_ranks(size, rank_losses)
    losses = [torch.cat([parts[window] for parts, _ in results], dim=1) for window in range(len(windows))]
    return torch.cat(losses, dim=1), [state for _, state in results], exchange


def gradients(model, losses):
    weights = torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype).view_as(losses)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((losses * weights).sum(), parameters), strict=True))


@pytest.mark.parametrize(("name", "size"), CASES)
def test_losses_and_gradients_are_those_of_one_rank(make_model, name, size):
    model, windows = make_model(CONFIGS[name]), make_windows(1)
    expected, _ = run_windows(model, windows)
    losses, _, _ = on_ranks(model, windows, size)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-11)
    ours, theirs = gradients(model, losses), gradients(model, expected)
    for parameter in theirs:
        scale = theirs[parameter].abs().max()
        torch.testing.assert_close(ours[parameter], theirs[parameter], rtol=1e-9, atol=1e-10 * scale.item())


@pytest.mark.parametrize("starts", ["everywhere", "nowhere", None])
@pytest.mark.parametrize("name", ["mlstm", "mlstm_sigmoid_unnormalised", "neurips_mlstm", "slstm", "attention"])
def test_documents_of_one_token_and_one_document(make_model, name, starts):
    model, (window,) = make_model(CONFIGS[name]), make_windows(1)
    window["document_start"] = None if starts is None else torch.full_like(window["document_start"], starts[0] == "e")
    expected, _ = run_windows(model, [window])
    losses, _, _ = on_ranks(model, [window], 2)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_states_continue_in_the_next_window(make_model, name, size):
    model, windows = make_model(CONFIGS[name]), make_windows(2)
    expected, expected_state = run_windows(model, windows)
    losses, states, _ = on_ranks(model, windows, size)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-11)
    ours, theirs = gradients(model, losses), gradients(model, expected)
    for parameter in theirs:
        scale = theirs[parameter].abs().max()
        torch.testing.assert_close(ours[parameter], theirs[parameter], rtol=1e-9, atol=1e-10 * scale.item())
    for index, kind in enumerate(CONFIGS[name].block_kinds()):
        if kind != "mlstm":
            # Spread by heads, a rank has the state of its own.
            continue
        for state in states:
            assert_equal_states(ModelState([state.blocks[index]]), ModelState([expected_state.blocks[index]]))


def assert_equal_states(ours: ModelState, theirs: ModelState) -> None:
    found: list[torch.Tensor] = []
    theirs.map(lambda tensor: found.append(tensor) or tensor)
    expected = iter(found)
    ours.map(lambda tensor: torch.testing.assert_close(tensor, next(expected), rtol=1e-9, atol=1e-11) or tensor)


@pytest.mark.parametrize("mode", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("name", ["hybrid", "neurips_mlstm_and_slstm"])
def test_what_is_recomputed_exchanges_nothing(make_model, name, mode):
    model, windows = make_model(CONFIGS[name]), make_windows(1)
    theirs = gradients(model, run_windows(model, windows)[0])
    model.activation_checkpointing = mode
    losses, _, exchange = on_ranks(model, windows, 2)
    rounds = exchange.rounds
    ours = gradients(model, losses)
    assert exchange.rounds == rounds > 0
    for parameter in theirs:
        scale = theirs[parameter].abs().max()
        torch.testing.assert_close(ours[parameter], theirs[parameter], rtol=1e-9, atol=1e-10 * scale.item())


def test_a_summary_as_sums_is_what_its_slice_does(make_model):
    """Also where a document starts, and behind a state that enters."""
    model = make_model(CONFIGS["mlstm"])
    collected = []

    class Collecting(type(LOCAL)):
        def incoming(self, summarise, before):
            collected.append(summarise())
            return super().incoming(summarise, before)

    generator = torch.Generator().manual_seed(1)
    document_start = torch.zeros(2, 9, dtype=torch.bool)
    document_start[0, 4] = True
    state = None
    for starts in (None, document_start, None):
        x = torch.randn(2, 9, 32, generator=generator, dtype=torch.float64)
        before = state
        _, state = model.blocks[0].mixer(x, starts, state, True, Collecting())
        summary = collected.pop()
        behind = summary.form.state_of(merged(sums_before(summary, before), summary.log_kept, summary.added))
        assert (summary.log_kept[0] == -torch.inf).all() == (starts is not None)
        for ours, theirs in zip((behind.C, behind.n, behind.m), (state.C, state.n, state.m), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_last_inputs_leave_out_documents_that_have_ended():
    x = torch.arange(1.0, 11.0).view(1, 5, 2)
    assert torch.equal(last_inputs(x, 3, None), x[:, 2:])
    start = torch.tensor([[False, False, False, True, False]])
    assert torch.equal(last_inputs(x, 3, start)[0], torch.tensor([[0.0, 0.0], [7, 8], [9, 10]]))
    with pytest.raises(AssertionError, match="a slice of 5 tokens is shorter than the 6"):
        last_inputs(x, 6, None)


def test_a_degree_that_a_kind_cannot_take_is_named():
    assert [sequence_problems(CONFIGS["hybrid"], ranks) for ranks in (1, 2)] == [[], []]
    assert sequence_problems(CONFIGS["hybrid"], 4) == [
        "model.slstm.n_heads=2 heads do not divide among 4 sequence ranks; choose a divisor of 2"
    ]
    assert sequence_problems(CONFIGS["mlstm"], 1024) == []
    grouped = CONFIGS["attention"]
    assert sequence_problems(grouped, 4) == []
    assert sequence_problems(grouped, 3) == [
        "model.attention.n_heads=4 heads do not divide among 3 sequence ranks; choose a divisor of 4"
    ]
    assert sequence_problems(CONFIGS["mlstm_attention"], 3) == [
        "model.layers.mlstm_attention.attention.n_heads=4 heads do not divide among 3 sequence ranks; choose a "
        "divisor of 4"
    ]
    six = dataclasses.replace(grouped.attention, n_heads=12, n_kv_heads=4)
    config: ModelConfig = dataclasses.replace(grouped, attention=six, slstm_at=[1], slstm=SLSTMConfig(n_heads=6))
    assert sequence_problems(config, 6) == [
        "model.attention.n_kv_heads=4 heads do not divide among 6 sequence ranks; choose a divisor of 4"
    ]
    assert layer_kind(config, "slstm").sequence_problem(config, 6) is None
