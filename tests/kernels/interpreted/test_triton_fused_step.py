"""Decoding with the fused step of model.generation.fused_step against model.predict, token by token."""

import dataclasses

import pytest
import torch

from model import statistics
from model.generation import fused_step
from tests.kernels.cases import relative_error
from tests.kernels.triton_cases import COMPILED, DEVICE
from tests.model_tools.small_models import CONFIGS, random_model

DTYPE = torch.bfloat16 if COMPILED else torch.float32
TOLERANCE = 1e-5
# Models with blocks that the kernels take.
TAKEN = ["mlstm", "sigmoid", "hybrid"]
STEPS = 40 if COMPILED else 2
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


def steps_of(step, tokens, state):
    """Logits [STEPS, rows, V] of a function of one token a row."""
    logits = []
    for token in tokens.t():
        found, state = step(token, state)
        logits.append(found)
    return torch.stack(logits)


def assert_as_exact(name, model, tokens, state, logits):
    """Logits are as near to those of the model in float64 as the model's own are, within what chance may do."""
    own = steps_of(lambda token, before: model.predict(token[:, None], state=before), tokens, state())
    # With the backend of the configuration, which takes float64.
    double = random_model(CONFIGS[name]).to(DEVICE, DTYPE).double()
    exact_state = state().map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    exact = steps_of(lambda token, before: double.predict(token[:, None], state=before), tokens, exact_state)
    assert logits.dtype == own.dtype
    # Both round, in different places. Some states make much of it, on some processors more than TOLERANCE.
    limit = max(1.5 * relative_error(own, exact), 0.0 if COMPILED else TOLERANCE)
    assert relative_error(logits, exact) < limit


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [1, 5])
@torch.inference_mode()
def test_logits_and_states_are_those_of_the_model(name, rows):
    model, tokens, state = prepared(name, rows)
    assert any(map(fused_step._takes, model.blocks)) == (name in TAKEN)
    assert_as_exact(name, model, tokens, state, steps_of(fused_step.step_of(model), tokens, state()))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.inference_mode()
def test_states_are_updated_where_they_lie(backend):
    model, tokens, state = prepared("mlstm", 2, backend)
    before = state()
    addresses = [block.C.data_ptr() for block in before.blocks]
    logits, behind = fused_step.step_of(model)(tokens[:, 0], before)
    assert addresses == [block.C.data_ptr() for block in behind.blocks]
    assert_as_exact("mlstm", model, tokens[:, :1], state, logits[None])


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
