"""transformers' xLSTM with our mLSTM in it, against itself as it came."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.xlstm.configuration_xlstm import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMCache, xLSTMForCausalLM

from kernels.adapters import TransformersMLSTM, use_in_transformers
from kernels.mlstm.inputs import CellSettings, cell_inputs
from kernels.mlstm.reference import mlstm_recurrent
from kernels.mlstm.state import MLSTMState

BATCH, HEADS, KEY, VALUE = 2, 2, 16, 32


def models(**settings) -> tuple[xLSTMForCausalLM, xLSTMForCausalLM]:
    """A small xLSTM of transformers in float32, and a copy that computes with ours."""
    given = {"chunk_size": 16, "autocast_kernel_dtype": "float32", "max_inference_chunksize": 48, **settings}
    config = xLSTMConfig(
        vocab_size=97, hidden_size=256, num_hidden_layers=2, num_heads=HEADS, qk_dim_factor=0.5, use_bias=False, **given
    )
    torch.manual_seed(0)
    theirs = xLSTMForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # Initialisation leaves gates at zero, so that nothing would depend on them.
            if "gate" in name:
                parameter.add_(torch.randn_like(parameter) / (1 if name.endswith("bias") else 8))
    ours = copy.deepcopy(theirs)
    assert use_in_transformers(ours) == 2
    return theirs, ours


@pytest.mark.parametrize("length", [1, 15, 16, 37, 130])
def test_logits_are_those_of_transformers(length):
    """One token, less than one of their chunks, one, several and a rest, more than they read at once."""
    theirs, ours = models()
    ids = torch.randint(97, (BATCH, length))
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids).logits
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_their_cache_carries_our_states():
    theirs, ours = models()
    ids = torch.randint(97, (BATCH, 40))
    caches = []
    with torch.no_grad():
        whole = theirs(ids).logits
        for model in (theirs, ours):
            cache = xLSTMCache(model.config, BATCH, dtype=torch.float32)
            parts = [model(part, cache_params=cache, use_cache=True).logits for part in ids.split([23, 1, 16], dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
            caches.append(cache)
    for layer in range(2):
        for expected, found in zip(*(cache.rnn_state[layer] for cache in caches), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_generate_gives_the_same_text():
    theirs, ours = models()
    ids = torch.randint(97, (BATCH, 20))
    expected, found = (
        model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
        for model in (theirs, ours)
    )
    assert len(set(expected[0, 20:].tolist())) > 3 and torch.equal(found, expected)


def test_gradients_are_those_of_transformers():
    theirs, ours = models(mode="train", return_last_states=True)
    ids = torch.randint(97, (BATCH, 48))
    for model in (theirs, ours):
        model.train()
        logits = model(ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for (name, expected), found in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert expected.grad.abs().max() > 0, name
        difference = (found.grad - expected.grad).abs().max() / expected.grad.abs().max()
        assert difference < 1e-4, f"{name}: {difference}"


def inputs(dtype: torch.dtype, length: int) -> dict[str, torch.Tensor]:
    """In the layout of transformers."""
    shapes = {
        "query": (BATCH, HEADS, length, KEY),
        "key": (BATCH, HEADS, length, KEY),
        "value": (BATCH, HEADS, length, VALUE),
        "igate": (BATCH, HEADS, length),
        "fgate": (BATCH, HEADS, length),
        "c_initial": (BATCH, HEADS, KEY, VALUE),
        "n_initial": (BATCH, HEADS, KEY),
        "m_initial": (BATCH, HEADS, 1),
    }
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def test_the_layer_is_the_recurrence_in_float64():
    given = inputs(torch.float64, 21)
    h, (C, n, m) = TransformersMLSTM(xLSTMConfig())(**given)
    q, k, v, i, f = (given[name].transpose(1, 2) for name in ("query", "key", "value", "igate", "fgate"))
    before = MLSTMState(given["c_initial"], given["n_initial"], given["m_initial"][..., 0])
    expected, state = mlstm_recurrent(q, cell_inputs(k, v, i, f, None, before), CellSettings(), return_state=True)
    torch.testing.assert_close(h.transpose(1, 2), expected)
    for found, wanted in ((C, state.C), (n, state.n), (m[..., 0], state.m)):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("settings", "options", "with_state"),
    [
        ({"mode": "inference"}, {"return_last_states": False}, True),
        ({"mode": "inference"}, {"mode": "train", "return_last_states": False}, False),
        ({"mode": "train", "return_last_states": False}, {}, False),
        ({"mode": "train", "return_last_states": False}, {"return_last_states": True}, True),
        ({"mode": "train", "return_last_states": True}, {}, True),
    ],
)
def test_states_come_where_transformers_returns_them(settings, options, with_state):
    given = inputs(torch.float32, 16)
    found = TransformersMLSTM(xLSTMConfig(**settings))(**given, **options)
    assert isinstance(found, tuple) == with_state


def test_what_does_not_fit_is_refused():
    llama = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer of transformers.models.xlstm"):
        use_in_transformers(LlamaForCausalLM(llama))
    _, ours = models()
    with pytest.raises(ValueError, match="has no layer of"):
        use_in_transformers(ours)
    layer, given = TransformersMLSTM(xLSTMConfig()), inputs(torch.float32, 3)
    with pytest.raises(ValueError, match="c_initial, n_initial and m_initial are one state"):
        layer(**{**given, "n_initial": None})
    with pytest.raises(ValueError, match=r"mode: no such mode \(dream\)"):
        layer(**given, mode="dream")
    with pytest.raises(ValueError, match="unknown mLSTM backend 'abacus'"):
        TransformersMLSTM(xLSTMConfig(), backend="abacus")(**given)
