"""Blocks that torch.compile made, against the same blocks as written."""

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from model import compilation, statistics
from model.compilation import COMPILED, WRITTEN
from model.initialisation import initialise
from model.language_model import LanguageModel
from model.presets import preset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    small = {"vocab_size": 64, "d_model": 32, "n_blocks": 3, "ffn_dim": 48, "slstm_at": []}
    config = dataclasses.replace(preset("tiny"), **small)
    config = dataclasses.replace(config, mlstm=dataclasses.replace(config.mlstm, n_heads=2, reference_chunk_size=8))
    model = LanguageModel(config)
    initialise(model, seed=0)
    return model


@pytest.fixture
def graphs():
    """How many graphs were compiled so far, in this test."""
    torch.compiler.reset()
    counters.clear()
    compilation.compiled.cache_clear()
    return lambda: counters["stats"]["unique_graphs"]


def batch(seed=0, batch=2, length=20):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (batch, length), generator=generator)
    starts = torch.rand(batch, length, generator=generator) < 0.2
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "document_start": starts, "loss_reduction": "sum"}


def gradients(model, inputs, execution, mode="none"):
    model.execution, model.activation_checkpointing = execution, mode
    loss = model(**inputs).loss_sum
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()} | {"loss": loss.detach()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("mode", ["none", "block", pytest.param("unit", marks=pytest.mark.layouts)])
def test_losses_and_gradients_are_those_of_the_blocks_as_written(model, mode):
    expected = gradients(model, batch(), WRITTEN, mode)
    found = gradients(model, batch(), COMPILED, mode)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def test_all_blocks_share_one_graph_whatever_the_documents_are(model, graphs):
    for seed in range(3):
        gradients(model, batch(seed), COMPILED)
    assert graphs() == 1


def test_blocks_that_loop_over_tokens_on_a_cpu_run_as_written(graphs):
    small = {"vocab_size": 64, "d_model": 32, "n_blocks": 2, "ffn_dim": 48, "slstm_at": [1]}
    config = dataclasses.replace(preset("tiny"), **small)
    mlstm = dataclasses.replace(config.mlstm, n_heads=2, reference_chunk_size=8)
    config = dataclasses.replace(config, mlstm=mlstm, slstm=dataclasses.replace(config.slstm, n_heads=2))
    model = LanguageModel(config)
    initialise(model, seed=0)
    expected, found = gradients(model, batch(), WRITTEN), gradients(model, batch(), COMPILED)
    assert graphs() == 1
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def test_evaluation_and_monitored_passes_run_as_written(model, graphs):
    model.execution, model.activation_checkpointing = COMPILED, "none"
    with torch.no_grad():
        model(**batch(batch=3))
    with statistics.recording() as recorded:
        model(**batch()).loss_sum.backward()
    model.zero_grad()
    assert graphs() == 0
    model.execution = WRITTEN
    with statistics.recording() as expected:
        model(**batch())
    assert recorded.values() == expected.values() and len(expected.values()) > 20


@pytest.mark.layouts
def test_states_are_carried_and_their_gradients_too(model):
    """As in time chunks: two halves, the second from the state behind the first."""

    def halves(execution):
        model.execution = execution
        first, second = (
            {name: inputs[name][:, part] for name in ("tokens", "targets", "document_start")}
            for inputs in [batch(length=32)]
            for part in (slice(0, 16), slice(16, 32))
        )
        one = model(**first, return_state=True, loss_reduction="sum")
        two = model(**second, state=one.state, loss_reduction="sum")
        (one.loss_sum + two.loss_sum).backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        return found

    expected, found = halves(WRITTEN), halves(COMPILED)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name
