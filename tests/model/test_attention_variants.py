"""Attention in a window, without positions, with sinks, as a layer of a model. Axes: B batch, S sequence."""

import dataclasses

import pytest
import torch

from model.config import validate_model
from model.generation import generate
from model.layers.attention import last_tokens
from tests.model.conftest import CONFIGS, model_in_play


@torch.no_grad()
def test_the_cache_of_a_window_has_one_size_and_decodes_like_the_whole_text(make_batch):
    model, tokens = model_in_play(CONFIGS["attention_window"]), make_batch()["tokens"]
    whole = model(tokens).logits
    state, shapes = None, set()
    for place in range(tokens.shape[1]):
        output = model(tokens[:, place : place + 1], state=state, return_state=True)
        torch.testing.assert_close(output.logits[:, 0], whole[:, place], rtol=1e-11, atol=1e-11)
        state = output.state
        state.map(lambda tensor: shapes.add(tuple(tensor.shape)) or tensor)
    assert shapes == {(2, 4, 2, 8), (2,)}


@torch.no_grad()
def test_a_window_looks_so_far_back_and_no_further():
    """One block, so that nothing is handed on by the blocks before it."""
    config = dataclasses.replace(CONFIGS["attention_window"], n_blocks=1)
    model, tokens = model_in_play(config), torch.arange(12)[None]
    changed = tokens.clone()
    changed[0, 3] = 50
    differs = (model(tokens).logits != model(changed).logits).any(-1)[0]
    assert differs.tolist() == [False] * 3 + [True] * 5 + [False] * 4


@torch.no_grad()
def test_generation_continues_as_the_full_forward_would():
    model = model_in_play(CONFIGS["attention_window"])
    prompt = torch.arange(7)[None]
    made = generate(model, prompt, max_new_tokens=15, temperature=0)
    text = torch.cat([prompt, made], dim=1)
    assert torch.equal(model(text[:, :-1]).logits.argmax(-1)[:, 6:], made)


@torch.no_grad()
def test_without_positions_a_document_in_reverse_order_ends_alike():
    """A query without positions sees a set, so that one block's last output knows no order of the tokens before."""
    config = dataclasses.replace(CONFIGS["attention_nope"], n_blocks=1, attention_at=[0], mlstm=None)
    rotary = dataclasses.replace(config, attention=dataclasses.replace(config.attention, positions="rotary"))
    tokens = torch.arange(9)[None]
    turned = torch.cat([tokens[:, :-1].flip(1), tokens[:, -1:]], dim=1)
    last = [[model_in_play(c)(text).logits[0, -1] for text in (tokens, turned)] for c in (config, rotary)]
    torch.testing.assert_close(*last[0], rtol=1e-12, atol=1e-12)
    assert (last[1][0] - last[1][1]).abs().max() > 1e-3


def test_the_last_tokens_of_a_short_text_have_zeros_in_front():
    x = torch.ones(1, 2, 1, 1)
    assert last_tokens(x, 3).flatten().tolist() == [0, 1, 1]
    assert last_tokens(x, 1).shape[1] == 1 and last_tokens(x, 0).shape[1] == 0


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ({"attention": {"windw": 3}}, "attention.windw: no such key (did you mean 'window'?)"),
        ({"attention": 3}, "attention: a section with keys is expected, not 3"),
        ({"mlstm": {"n_heads": "two"}}, "mlstm.n_heads: Value 'two' of type 'str' could not be converted to Integer"),
        ({"attention": {"n_heads": 4, "n_kv_heads": 3}}, "attention.n_kv_heads: 3 do not divide n_heads 4"),
        (
            {"mlstm": {"n_heads": 2, "v_dim_factor": 2.0}},
            "mlstm.v_dim_factor: is 2.0; both sides are added, so it must",
        ),
    ],
    ids=["unknown", "no section", "type", "attention", "mlstm"],
)
def test_what_is_wrong_on_a_side_is_named_with_its_key(sides, expected):
    right = {"mlstm": {"n_heads": 2}, "attention": {"n_heads": 4, "n_kv_heads": 4}}
    config = dataclasses.replace(CONFIGS["mlstm_attention"], layers={"mlstm_attention": {**right, **sides}})
    problems = validate_model(config)
    assert len(problems) == 1 and problems[0].startswith(f"model.layers.mlstm_attention.{expected}"), problems
