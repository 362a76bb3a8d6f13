"""The rows of a session: given, taken, moved, and stepped in batches of one size or several."""

import pytest
import torch

from model.generation import Session
from model.state import ModelState, named_tensors
from tests.model_tools.small_models import CONFIGS, random_model

TOKENS = torch.randint(96, (3, 30), generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_goes_on_as_its_sequence_does_wherever_it_moves(name):
    model = random_model(CONFIGS[name]).double()
    session = Session(model, 3)
    whole = model(TOKENS).logits
    session.fit(20)
    for row in range(3):
        logits, state = model.predict(TOKENS[row : row + 1, :20])
        session.put(row, state, logits)
    order = [0, 1, 2]
    for place in range(20, 29):
        if place == 24:
            # The sequence of row 0 is given up.
            session.move(2, 0)
            order = [2, 1]
        session.tokens[: len(order)] = TOKENS[order, place]
        session.fit(place + 1)
        session.step(len(order))
        torch.testing.assert_close(session.logits[: len(order)], whole[order, place], rtol=1e-9, atol=1e-9)
    rest, _ = model.predict(TOKENS[2:, 29:], state=session.take(0))
    torch.testing.assert_close(rest, whole[2:, 29], rtol=1e-9, atol=1e-9)


def test_what_was_put_into_a_row_stays_as_it_is():
    model = random_model(CONFIGS["hybrid"])
    logits, state = model.predict(TOKENS[:1])
    before = [tensor.clone() for _, tensor in named_tensors(state)]
    session = Session(model, 2)
    session.put(1, state, logits)
    for _ in range(3):
        session.step(2)
    assert all(torch.equal(tensor, old) for (_, tensor), old in zip(named_tensors(state), before, strict=True))


def test_a_step_has_the_smallest_batch_that_suffices(monkeypatch):
    sizes = []
    monkeypatch.setattr(Session, "advance", lambda _self, size: sizes.append(size))
    for session in (
        Session(random_model(CONFIGS["mlstm"]), 6),
        Session(random_model(CONFIGS["mlstm"]), 6, batch_sizes=[6]),
    ):
        for rows in (1, 2, 3, 5, 6):
            session.step(rows)
    assert sizes == [1, 2, 4, 6, 6, 6, 6, 6, 6, 6]


def test_a_state_that_grows_by_itself_is_refused(monkeypatch):
    # As a layer's that registers nothing.
    monkeypatch.setattr(ModelState, "for_decoding", lambda self, room=None: self)
    session = Session(random_model(CONFIGS["attention"]), 1)
    with pytest.raises(
        ValueError, match=r"the state blocks.0.keys went from \(1, 1, 4, 32\) to \(1, 2, 4, 32\) in one"
    ):
        session.step(1)
