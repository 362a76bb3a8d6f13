"""Windows of one text, one a step, begin with the state behind the window before."""

import dataclasses

import pytest
import torch

from model.state import named_tensors
from tests.marking import mark_checkpoint
from tests.model.conftest import CONFIGS, model_in_play
from train.checkpoints.lanes import LanesReader, save_lanes
from train.checkpoints.layout import CheckpointError
from train.parallel.carried_state import CarriedState
from train.parallel.time_chunks import TimeChunks
from train.parallel.token_loss import TokenLossSum

EXACT = {"rtol": 1e-10, "atol": 1e-10}
ONE = torch.tensor(1.0, dtype=torch.float64)
GOES_ON = torch.tensor([True, True])


@pytest.fixture(scope="module")
def model():
    return model_in_play(CONFIGS["neurips_mlstm_and_slstm"])


def form(model, rows):
    with torch.no_grad():
        return model.advance(torch.zeros(rows, 1, dtype=torch.int64))


def carried_by(model, lanes=range(4), rows=2):
    return CarriedState(lanes, rows, lambda rows: form(model, rows))


def some_state(model, seed, rows=2):
    tokens = torch.randint(0, 61, (rows, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.advance(tokens)


def leaves(state):
    return dict(named_tensors(state))


def assert_equal(state, other):
    assert leaves(state).keys() == leaves(other).keys()
    for name, tensor in leaves(state).items():
        assert tensor.dtype == leaves(other)[name].dtype and torch.equal(tensor, leaves(other)[name]), name


@pytest.mark.parametrize("length", [None, 3])
def test_losses_are_those_of_one_pass_over_all_windows_and_no_gradient_crosses_them(model, length):
    tokens = torch.randint(0, 61, (2, 21), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros_like(tokens[:, 1:], dtype=torch.bool)
    starts[0, 12] = True
    text = tokens[:, :-1], tokens[:, 1:], starts
    carried, module = carried_by(model, range(2)), TokenLossSum(model, 0.0)
    model.zero_grad()
    losses = []
    for begin in (0, 7, 14):
        window = tuple(part[:, begin : begin + 7] for part in text)
        continues = torch.tensor([begin > 0] * 2)
        entering = carried.entering(0, continues)
        assert (entering is None) == (begin == 0)
        loss, behind = TimeChunks(length).forward_backward(
            module, window, torch.Tensor.backward, ONE, entering, return_state=True
        )
        carried.leave(0, behind)
        losses.append(loss)
    gradient = model.embedding.weight.grad.clone()
    model.zero_grad()
    whole = module(*text)[0]
    whole.backward()
    torch.testing.assert_close(torch.stack(losses).sum(), whole.detach(), **EXACT)
    assert not torch.allclose(gradient, model.embedding.weight.grad, rtol=1e-3)


def test_rows_that_begin_anew_are_empty_and_the_others_untouched(model):
    carried = carried_by(model)
    states = [some_state(model, seed) for seed in (1, 2)]
    for number, state in enumerate(states):
        carried.leave(number, state)
    assert_equal(carried.entering(1, GOES_ON), states[1])
    half = carried.entering(0, torch.tensor([False, True]))
    for name, tensor in leaves(half).items():
        assert not tensor[0].any() and torch.equal(tensor[1], leaves(states[0])[name][1])
    assert carried.entering(0, ~GOES_ON) is None and carried.entering(0, None) is None
    carried.clear()
    assert carried.entering(1, GOES_ON) is None and carried.tensors() == {}


def test_an_empty_row_is_that_of_a_document_start(model):
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    empty = form(model, 2).map(torch.zeros_like)
    expected = model(tokens).logits
    torch.testing.assert_close(model(tokens, state=empty).logits, expected, **EXACT)


def test_only_rows_that_are_not_finite_are_dropped(model):
    carried, state = carried_by(model), some_state(model, 1)
    broken = dataclasses.replace(state, blocks=list(state.blocks)).map(torch.clone)
    broken.blocks[1].cell.c[1, 0, 3] = float("nan")
    carried.leave(0, state)
    carried.leave(1, broken)
    carried.drop_non_finite()
    assert_equal(carried.entering(0, GOES_ON), state)
    for name, tensor in leaves(carried.entering(1, GOES_ON)).items():
        assert torch.equal(tensor[0], leaves(state)[name][0]) and not tensor[1].any()


def test_lanes_are_laid_out_anew_over_other_ranks_and_micro_batches(model, tmp_path):
    (tmp_path / "carried").mkdir()
    mark_checkpoint(tmp_path)
    assert LanesReader(tmp_path).is_empty
    state = some_state(model, 1, rows=8)
    for rank in (0, 1):
        lanes = range(4 * rank, 4 * rank + 4)
        carried = carried_by(model, lanes)
        for number in (0, 1):
            first = lanes.start + 2 * number
            carried.leave(number, state.map(lambda tensor, first=first: tensor[first : first + 2]))
        save_lanes(tmp_path, rank, lanes.start, carried.tensors())
    mark_checkpoint(tmp_path)
    reader = LanesReader(tmp_path)
    for lanes, rows in ((range(8), 1), (range(8), 8), (range(2, 4), 2), (range(2, 6), 4)):
        carried = carried_by(model, lanes, rows)
        carried.fill(reader.read)
        for name, tensor in carried.tensors().items():
            assert torch.equal(tensor, leaves(state)[name][lanes.start : lanes.stop])
    with pytest.raises(CheckpointError, match="does not hold each of the lanes 6 to 9 once"):
        carried_by(model, range(6, 10), 4).fill(reader.read)
    with pytest.raises(CheckpointError, match="has no blocks.9.cell, which the model carries"):
        reader.read("blocks.9.cell", range(2))
