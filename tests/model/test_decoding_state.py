"""Decoding on a state that steps overwrite. Axes: B batch, S sequence."""

import pytest
import torch

from kernels.mlstm import MLSTMState
from kernels.mlstm.step import DecodingState
from model.config import AttentionConfig, ModelConfig, validate_model
from model.state import named_tensors


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


@torch.no_grad()
def test_caches_with_room_are_added_to_where_they_lie(config, make_model, make_batch):
    model, tokens = make_model(config), make_batch()["tokens"]
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    # The rows' open documents are of different lengths.
    starts[0, 3] = starts[1, 7] = True
    prefix, rest = tokens[:, :-8], tokens[:, -8:]
    fresh = model(prefix, document_start=starts[:, :-8], return_state=True).state
    first, kept = fresh, [tensor.clone() for _, tensor in named_tensors(fresh)]
    reused = fresh.for_decoding(prefix.shape[1] + 2)
    for t in range(4):
        if t == 2:
            reused = reused.for_decoding(prefix.shape[1] + 40)
        expected = model(rest[:, t : t + 1], state=fresh, return_state=True)
        actual = model(rest[:, t : t + 1], state=reused, return_state=True)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-12, atol=1e-12)
        fresh, reused = expected.state, actual.state
    # Several tokens continue it too.
    expected, actual = (model(rest[:, 4:], state=state, return_state=True) for state in (fresh, reused))
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-12, atol=1e-12)
    for (_, tensor), old in zip(named_tensors(first), kept, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("block", ["attention", "mlstm_attention"])
@pytest.mark.parametrize(
    "variant", [{"sinks": True}, {"positions": "none"}, {"sinks": True, "positions": "none", "n_kv_heads": 2}]
)
def test_every_attention_adds_to_its_cache(block, variant, make_model, make_batch):
    settings = {"n_heads": 4, "n_kv_heads": 4, "window": None, **variant}
    config = ModelConfig(
        vocab_size=61,
        d_model=32,
        n_blocks=2,
        block=block,
        ffn_dim=64,
        attention=AttentionConfig(**settings) if block == "attention" else None,
        layers={} if block == "attention" else {block: {"mlstm": {"n_heads": 2}, "attention": settings}},
    )
    assert not validate_model(config)
    test_caches_with_room_are_added_to_where_they_lie(config, make_model, make_batch)
