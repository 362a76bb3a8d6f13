"""Steps that are played from CUDA graphs, against the same steps launched kernel by kernel."""

import copy
import random
import warnings

import pytest
import torch

from model.generation import ContinuousBatch, SamplingSettings, Session, generate
from model.generation import session as session_module
from tests.kernels.cases import relative_error
from tests.model_tools.small_models import CONFIGS, random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def unplayed(monkeypatch):
    """Calls a function while no session plays graphs."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(session_module, "PLAYING_GRAPHS", ())
            return function()

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_played_steps_give_the_tokens_of_launched_ones(name, dtype, unplayed):
    model = random_model(CONFIGS[name]).to("cuda", dtype)
    prompt = torch.randint(96, (3, 40), generator=torch.Generator().manual_seed(2))

    def tokens():
        return generate(model, prompt, max_new_tokens=200, temperature=0.7, seed=3)

    expected = unplayed(tokens)
    with warnings.catch_warnings():
        # A model that cannot be captured is told of by a warning.
        warnings.simplefilter("error")
        assert torch.equal(tokens(), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_join_and_leave_while_graphs_are_played(name, unplayed):
    model, chooser = random_model(CONFIGS[name]).to("cuda"), random.Random(1)
    asked = [
        ([chooser.randrange(96) for _ in range(chooser.randint(1, 150))], SamplingSettings(chooser.randint(1, 60), 0))
        for _ in range(20)
    ]

    def told():
        batch = ContinuousBatch(model, 8, prefill_tokens=32, batch_sizes=[8])
        order, found = random.Random(2), {}
        left = list(asked)
        while left or batch.waiting or batch.running:
            if left and order.random() < 0.3:
                batch.add(*left.pop())
            for token in batch.step():
                found.setdefault(token.request, []).append(token.token)
        return found

    assert told() == unplayed(told)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_logits_are_as_near_to_the_exact_ones_as_without_fused_steps(name, rows, monkeypatch):
    model = random_model(CONFIGS[name]).to("cuda", torch.bfloat16)
    double = copy.deepcopy(model).double()
    tokens = torch.randint(96, (rows, 80), generator=torch.Generator().manual_seed(2)).cuda()

    def logits():
        session = Session(model, rows)
        with torch.inference_mode():
            first, state = model.predict(tokens[:, :40])
            session.put(0, state, first)
            found = []
            for token in tokens[:, 40:].t():
                session.tokens.copy_(token)
                session.step(rows)
                found.append(session.logits.clone())
        return torch.stack(found, dim=1)

    with torch.inference_mode():
        exact = double(tokens).logits[:, 40:]
    fused = logits()
    with monkeypatch.context() as patch:
        patch.setattr(session_module, "step_of", lambda model: lambda x, state: model.predict(x[:, None], state=state))
        ordinary = logits()
    # Both round to bfloat16, in different places.
    assert relative_error(fused, exact) < 1.5 * relative_error(ordinary, exact)


def test_a_capture_leaves_states_as_they_were():
    model = random_model(CONFIGS["hybrid"]).to("cuda")
    session = Session(model, 4)
    logits, state = model.predict(torch.arange(30, device="cuda")[None])
    session.put(0, state, logits)
    before = session.take(0)
    session.step(1)
    with torch.inference_mode():
        expected, _ = model.predict(session.tokens[:1, None], state=before)
    assert torch.allclose(session.logits[:1], expected, atol=1e-4)
    session.step(1)
    assert not torch.allclose(session.logits[:1], expected, atol=1e-4)
