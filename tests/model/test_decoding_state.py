"""Decoding on a state that steps overwrite. Axes: B batch, S sequence."""

import torch

from kernels.mlstm import MLSTMState
from kernels.mlstm.step import DecodingState


def cells(state):
    parts = [getattr(block, "cell", getattr(block, "mlstm", block)) for block in state.blocks]
    return [part for part in parts if isinstance(part, (MLSTMState, DecodingState))]


@torch.no_grad()
def test_steps_on_a_decoding_state_equal_those_on_fresh_ones(config, make_model, make_batch):
    model, tokens = make_model(config), make_batch()["tokens"]
    prefix, rest = tokens[:, :-4], tokens[:, -4:]
    kept = model(prefix, return_state=True).state
    before = [part.C.clone() for part in cells(kept)]
    fresh, reused = kept, kept.for_decoding()
    places = [part.C.data_ptr() for part in cells(reused)]
    for t in range(rest.shape[1]):
        expected = model(rest[:, t : t + 1], state=fresh, return_state=True)
        actual = model(rest[:, t : t + 1], state=reused, return_state=True)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-12, atol=1e-12)
        fresh, reused = expected.state, actual.state
    assert [part.C.data_ptr() for part in cells(reused)] == places
    assert len(places) == sum(kind in ("mlstm", "mlstm_attention") for kind in config.block_kinds())
    for part, old in zip(cells(kept), before, strict=True):
        assert torch.equal(part.C, old)


def test_with_gradients_a_decoding_state_stays_as_it_is(small_configs, make_model, make_batch):
    model, tokens = make_model(small_configs["mlstm"]), make_batch()["tokens"]
    with torch.no_grad():
        state = model(tokens[:, :-1], return_state=True).state.for_decoding()
    before = [part.C.clone() for part in cells(state)]
    model(tokens[:, -1:], state=state).logits.sum().backward()
    assert all(torch.equal(part.C, old) for part, old in zip(cells(state), before, strict=True))
