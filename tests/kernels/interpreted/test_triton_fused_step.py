"""Decoding with the fused step of model.generation.fused_step against model.predict, token by token."""

import dataclasses

import pytest
import torch

from model import statistics
from model.generation import fused_step
from tests.kernels.cases import relative_error
from tests.kernels.triton_cases import COMPILED, DEVICE
from tests.model_tools.small_models import CONFIGS, random_model

# On a GPU both round to bfloat16, in different places.
DTYPE, TOLERANCE = (torch.bfloat16, 3e-2) if COMPILED else (torch.float32, 1e-5)
# Models with blocks that the kernels take.
TAKEN = ["mlstm", "sigmoid", "hybrid"]
STEPS = 3
BACKENDS = ["auto"] if COMPILED else ["auto", "triton"]


def prepared(name, rows, backend="auto"):
    """A model, tokens [rows, STEPS] and a function that makes the state behind a prompt, for decoding."""
    config = CONFIGS[name]
    if name in TAKEN:
        config = dataclasses.replace(config, mlstm=dataclasses.replace(config.mlstm, backend=backend))
    model = random_model(config).to(DEVICE, DTYPE)
    tokens = torch.randint(96, (rows, 20 + STEPS), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.inference_mode():
        _, state = model.predict(tokens[:, :20])
    return model, tokens[:, 20:], lambda: state.for_decoding(64)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [1, 5])
@torch.inference_mode()
def test_logits_and_states_are_those_of_the_model(name, rows):
    model, tokens, state = prepared(name, rows)
    assert any(map(fused_step._takes, model.blocks)) == (name in TAKEN)
    step, mine, expected = fused_step.step_of(model), state(), state()
    for token in tokens.t():
        logits, mine = step(token, mine)
        wanted, expected = model.predict(token[:, None], state=expected)
        assert logits.dtype == wanted.dtype and relative_error(logits, wanted) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@torch.inference_mode()
def test_states_are_updated_where_they_lie(backend):
    model, tokens, state = prepared("mlstm", 2, backend)
    before = state()
    _, behind = fused_step.step_of(model)(tokens[:, 0], before)
    _, expected = model.predict(tokens[:, :1], state=state())
    for old, new, wanted in zip(before.blocks, behind.blocks, expected.blocks, strict=True):
        assert new is old and relative_error(new.C, wanted.C) < TOLERANCE


@torch.inference_mode()
def test_what_the_kernels_cannot_take_goes_the_ordinary_way(monkeypatch):
    model, tokens, state = prepared("mlstm", 3)
    expected, _ = model.predict(tokens[:, :1], state=state())
    step = fused_step.step_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(fused_step.decoding, "MAX_ROWS", 2)
        assert torch.equal(step(tokens[:, 0], state())[0], expected)
    with statistics.recording():
        assert torch.equal(step(tokens[:, 0], state())[0], expected)
    reference = prepared("mlstm", 3, "reference")[0]
    assert not any(map(fused_step._takes, reference.blocks))
    assert not any(map(fused_step._takes, model.half().blocks))
