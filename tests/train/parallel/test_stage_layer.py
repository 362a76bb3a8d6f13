"""Stages that go chunk by chunk through the pipeline's schedule have the losses and gradients of one pass."""

import contextlib
import weakref

import pytest
import torch

from data_pipeline.reading.batch import Batch
from model.parts import split
from model.stages import Stage
from model.statistics import recording
from tests.model.conftest import CONFIGS, model_in_play
from tests.train.parallel import simulated_pipeline
from train.parallel.pipeline_schedule import UnitSchedule
from train.parallel.stage_layer import StageLayer, units_of
from train.parallel.time_chunks import TimeChunks
from train.parallel.token_loss import TokenLossSum

TOKENS, MICRO_BATCHES = 29, 2
# Float64: only rounding is left.
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SCALE = torch.tensor(0.37, dtype=torch.float64)
CPU = torch.device("cpu")


@pytest.fixture
def batches():
    """Documents that begin inside of chunks and with them, and masked targets: a whole chunk of them in one row."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for shift in range(MICRO_BATCHES):
        tokens, targets = (torch.randint(0, 61, (2, TOKENS), generator=generator) for _ in range(2))
        targets[shift, 8:17] = -100
        document_start = torch.zeros(2, TOKENS, dtype=torch.bool)
        document_start[0, [0, 11, 13 + shift]] = True
        document_start[1, [8, 19]] = True
        found.append(Batch(tokens, targets, document_start, ["a", "a"]))
    return found


class ComputingStage(simulated_pipeline.Stage):
    """Computes what DeepSpeed's engine lets a stage compute."""

    def __init__(self, schedule, stage, batches, chunks):
        super().__init__(schedule)
        self.layer = StageLayer(stage, 0.01, contextlib.nullcontext)
        self.layer.units = units_of(batches, chunks, SCALE, CPU)
        self.tokens = [batch.tokens[:, chunk] for batch in batches for chunk in chunks]
        self.received, self.loss = {}, torch.zeros((), dtype=torch.float64)

    def forward(self, unit, received):
        inputs = self.tokens[unit]
        if not self.layer.model.part.embedding:
            inputs = self.received[unit] = received.detach().requires_grad_()
        output = self.layer(inputs)
        if self.layer.model.part.head:
            self.loss += output.detach()
        return output

    def backward(self, unit, output, gradient):
        output.backward(None if self.layer.model.part.head else gradient)
        return None if self.layer.model.part.embedding else self.received.pop(unit).grad


def stages_of(model, number, mode):
    """The model as so many stages, which have its weights, or copies where there are two."""
    stages = []
    for part in split(model.config, list(range(1, number))):
        stage = Stage(model.config, part).to(torch.float64)
        stage.activation_checkpointing = mode
        stage.load_state_dict({name: model.state_dict()[name] for name in stage.state_dict()})
        stages.append(stage)
    return stages


def passes(model, batches, length, number=2, mode="none"):
    """Loss and gradients by name, those of tied copies added."""
    chunks = TimeChunks(length).ranges(TOKENS)
    stages = [
        ComputingStage(UnitSchedule(MICRO_BATCHES, len(chunks), number, place), stage, batches, chunks)
        for place, stage in enumerate(stages_of(model, number, mode))
    ]
    simulated_pipeline.run(stages)
    gradients = {}
    for stage in stages:
        for name, parameter in stage.layer.model.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad
    return stages[-1].loss, gradients


def in_one_pass(model, batches):
    model.zero_grad()
    module = TokenLossSum(model, 0.01)
    losses = [module(batch.tokens, batch.targets, batch.document_start)[0] * SCALE for batch in batches]
    sum(losses).backward()
    return sum(losses).detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_gradients_are_those_of_one_pass(name, batches):
    """Chunks of 8 leave 5 tokens for the last one; a chunk of 2 is shorter than the convolution looks back."""
    model = model_in_play(CONFIGS[name])
    expected = in_one_pass(model, batches)
    for length in (None, 2, 8):
        assert_same(passes(model, batches, length, number=model.config.n_blocks), expected)


@pytest.mark.parametrize("mode", ["unit", "block"])
@pytest.mark.parametrize("name", ["hybrid", "neurips_mlstm_and_slstm"])
def test_activation_checkpointing_inside_chunks(name, mode, batches):
    model = model_in_play(CONFIGS[name])
    expected = in_one_pass(model, batches)
    assert_same(passes(model, batches, 8, mode=mode), expected)


@pytest.mark.parametrize("name", ["hybrid", "neurips_mlstm_and_slstm"])
def test_monitors_report_the_numbers_of_one_stage(name, batches):
    model = model_in_play(CONFIGS[name])
    with recording() as of_one:
        for batch in batches:
            arguments = (batch.tokens, batch.targets, batch.document_start)
            TimeChunks(8).forward_backward(TokenLossSum(model, 0.01), arguments, torch.Tensor.backward, SCALE)
    with recording() as of_stages:
        passes(model, batches, 8)
    found, expected = of_stages.values(), of_one.values()
    assert found.keys() == expected.keys() and len(found) > 20
    for key, (reduction, value) in expected.items():
        assert found[key][0] == reduction
        torch.testing.assert_close(found[key][1], value, rtol=1e-6, atol=1e-6)


class Kept:
    """A tensor that a graph has saved."""

    def __init__(self, tensor):
        self.tensor = tensor


class MeasuredStage(ComputingStage):
    """Counts the bytes that its graphs have saved, each memory once."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.most_bytes, self.live = 0, weakref.WeakSet()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in self.layer.model.parameters()}

    def keep(self, tensor):
        kept = Kept(tensor)
        if tensor.untyped_storage().data_ptr() not in self.weights:
            self.live.add(kept)
        return kept

    def forward(self, unit, received):
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda kept: kept.tensor):
            output = super().forward(unit, received)
        storages = [kept.tensor.untyped_storage() for kept in self.live]
        self.most_bytes = max(self.most_bytes, sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
        return output


@pytest.mark.parametrize("name", ["mlstm_and_slstm", "neurips_mlstm_and_slstm"])
def test_what_a_stage_keeps_is_what_its_chunks_in_flight_need(name):
    """Of k chunks k + p - 1 - i at stage i, so of whole micro-batches p - i."""
    model = model_in_play(CONFIGS[name])
    number, micro_batches, tokens = model.config.n_blocks, 4, torch.zeros(1, 256, dtype=torch.int64)
    batches = [Batch(tokens, tokens, tokens.bool(), ["a"])] * micro_batches

    def most_kept(count):
        chunks = TimeChunks(256 // count).ranges(256)
        stages = [
            MeasuredStage(UnitSchedule(micro_batches, count, number, place), stage, batches, chunks)
            for place, stage in enumerate(stages_of(model, number, "none"))
        ]
        return [stage.most_bytes for stage in simulated_pipeline.run(stages)]

    shares = [of_chunks / whole for of_chunks, whole in zip(most_kept(4), most_kept(1), strict=True)]
    expected = [(4 + number - 1 - place) / 4 / (number - place) for place in range(number)]
    assert shares == pytest.approx(expected, rel=0.02)
