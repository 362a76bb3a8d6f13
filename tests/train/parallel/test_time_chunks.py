"""Chunk by chunk in time a micro-batch has the gradients, the losses and the statistics of one pass."""

import pytest
import torch

from model.statistics import recording
from tests.model.conftest import CONFIGS, model_in_play
from train.parallel.time_chunks import TimeChunks
from train.parallel.token_loss import TokenLossSum

TOKENS = 29
# Float64: only rounding is left.
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SCALE = torch.tensor(0.37, dtype=torch.float64)


@pytest.fixture
def batch():
    """Documents that begin inside of chunks and with them, and masked targets: a whole chunk of them in one row."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 61, (2, TOKENS), generator=generator)
    targets = torch.randint(0, 61, (2, TOKENS), generator=generator)
    targets[0, 8:17] = -100
    targets[1, 3] = -100
    document_start = torch.zeros_like(tokens, dtype=torch.bool)
    document_start[0, [0, 11, 13]] = True
    document_start[1, [8, 19]] = True
    return tokens, targets, document_start


def passes(model, batch, length, z_loss_weight=0.01, **state):
    """Loss, gradients by name, and the state behind the batch."""
    model.zero_grad()
    module = TokenLossSum(model, z_loss_weight)
    loss, behind = TimeChunks(length).forward_backward(module, batch, torch.Tensor.backward, SCALE, **state)
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, behind


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_gradients_are_those_of_one_pass(name, batch):
    """Chunks of 8 leave 5 tokens for the last one; a chunk of 2 is shorter than the convolution looks back."""
    model = model_in_play(CONFIGS[name])
    model.zero_grad()
    loss = TokenLossSum(model, 0.01)(*batch)[0]
    (loss * SCALE).backward()
    expected = loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for length in (2, 8, 2 * TOKENS):
        assert_same(passes(model, batch, length), expected)


@pytest.mark.parametrize("mode", ["unit", "block"])
@pytest.mark.parametrize("name", ["hybrid", "neurips_mlstm_and_slstm"])
def test_activation_checkpointing_inside_chunks(name, mode, batch):
    model = model_in_play(CONFIGS[name])
    expected = passes(model, batch, None)
    model.activation_checkpointing = mode
    assert_same(passes(model, batch, 8), expected)


@pytest.mark.parametrize("name", ["mlstm_and_slstm", "neurips_mlstm_and_slstm"])
def test_a_state_enters_and_leaves_without_a_graph(name, batch):
    """Two batches, the second from the state behind the first, as windows of one text have it."""
    model = model_in_play(CONFIGS[name])
    first, second = (tuple(part.roll(shift, 1) for part in batch) for shift in (0, 5))
    for state in (passes(model, first, length, return_state=True)[2] for length in (None, 8)):
        found = [passes(model, second, length, state=state, return_state=True) for length in (None, 8)]
        assert_same(found[1], found[0])
        leaves = [[], []]
        for tensors, of in zip(leaves, found, strict=True):
            of[2].map(lambda tensor, tensors=tensors: tensors.append(tensor) or tensor)
        for one, other in zip(*leaves, strict=True):
            assert not one.requires_grad and not other.requires_grad
            torch.testing.assert_close(other, one, **EXACT)
    empty = passes(model, second, 8)
    assert (found[1][0] - empty[0]).abs() > 1e-3


def test_an_engine_may_scale_what_it_differentiates(batch):
    """As DeepSpeed does with a loss scale."""
    model = model_in_play(CONFIGS["hybrid"])
    expected = passes(model, batch, 8)
    model.zero_grad()
    TimeChunks(8).forward_backward(TokenLossSum(model, 0.01), batch, lambda loss: (4 * loss).backward(), SCALE)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 4 * expected[1][name], **EXACT)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_losses_without_gradients_are_those_of_one_pass(name, batch):
    module = TokenLossSum(model_in_play(CONFIGS[name]), 0.0).eval()
    with torch.no_grad():
        expected = TimeChunks().loss_sum(module, batch)
        torch.testing.assert_close(TimeChunks(8).loss_sum(module, batch), expected, **EXACT)
    assert expected == module(*batch)[0]


@pytest.mark.parametrize("name", ["hybrid", "neurips_mlstm_and_slstm"])
def test_monitors_report_the_numbers_of_one_pass(name, batch):
    """All but those of a sequence's first tokens, which are of its first chunk."""
    model = model_in_play(CONFIGS[name])
    found = []
    for length in (None, 8):
        with recording() as recorded:
            # Two micro-batches.
            passes(model, batch, length)
            passes(model, tuple(part.flip(0) for part in batch), length)
        found.append(recorded.values())
    one, chunked = found
    assert chunked.keys() == one.keys()
    of_slstm = tuple(f"blocks.{index:02d}.mixer." for index, block in enumerate(model.blocks) if block.kind == "slstm")
    marks = ("stabiliser", "normaliser_floor", "logits")
    beginning = [key for key in one if key.startswith(of_slstm) or any(mark in key for mark in marks)]
    for key, (reduction, value) in one.items():
        assert chunked[key][0] == reduction
        if key not in beginning:
            torch.testing.assert_close(chunked[key][1], value, rtol=1e-5, atol=1e-6, msg=lambda t, k=key: f"{k}: {t}")
    with recording() as recorded:
        first_chunk = tuple(part[:, :8] for part in batch)
        passes(model, first_chunk, None)
        passes(model, tuple(part.flip(0) for part in first_chunk), None)
    for key in beginning:
        torch.testing.assert_close(chunked[key][1], recorded.values()[key][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mlstm_and_slstm", "neurips_mlstm_and_slstm"])
def test_what_a_backward_pass_keeps_does_not_grow_with_the_length(name):
    """At the start of each: the tensors that its graph has saved, each memory counted once."""
    model = model_in_play(CONFIGS[name])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    batch = torch.zeros(1, 128, dtype=torch.int64), torch.zeros(1, 128, dtype=torch.bool)
    weights |= {tensor.untyped_storage().data_ptr() for tensor in batch}

    def most_kept(tokens, length):
        kept, found = {}, []

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        def backward(loss):
            found.append(sum(size for size, _ in kept.values()))
            kept.clear()
            loss.backward()

        inputs, starts = (tensor[:, :tokens] for tensor in batch)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            TimeChunks(length).forward_backward(TokenLossSum(model, 0.0), (inputs, inputs, starts), backward, SCALE)
        return max(found)

    assert most_kept(128, 16) == most_kept(64, 16) < 1.2 * most_kept(16, None)
    assert most_kept(64, None) > 3 * most_kept(64, 16)


def test_chunks_of_a_sequence():
    assert TimeChunks(8).ranges(17) == [slice(0, 8), slice(8, 16), slice(16, 17)]
    assert [TimeChunks(length).count(17) for length in (None, 1, 8, 17, 99)] == [1, 17, 3, 1, 1]
