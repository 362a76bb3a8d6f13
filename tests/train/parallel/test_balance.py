"""How the blocks of a model are cut into stages."""

import itertools

import pytest

from conf import compose
from model.accounting import count_parameters, parameter_shapes, training_flops_per_token
from model.hardware import Hardware
from model.parts import split
from train.config import RunConfig
from train.parallel.balance import TOLERANCE, Accounts, bubble, parts_of, slowest_against_mean, stage_costs
from train.parallel.mesh import MeshShape
from train.plan import make_plan

BASE = ["name=x", "corpus.directory=y", "training.total_steps=100", "recipe=none", "training.global_batch_size=64"]
MODELS = {
    "160m": ["model=xlstm_160m"],
    "mixed": ["model=xlstm_7b_mixed"],
    "tied": ["model=xlstm_160m", "model.tie_embeddings=true"],
    "recomputed": ["model=xlstm_160m", "parallel.activation_checkpointing=block"],
}


def configuration(*overrides):
    return compose(RunConfig, "train", [*BASE, *overrides])


def costs(config, stages, data=1, sequence=1):
    return stage_costs(config, MeshShape(stages, data, sequence), Hardware())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stages", [2, 4])
def test_the_stages_are_the_whole_model(model, stages):
    config = configuration(*MODELS[model])
    found = costs(config, stages)
    parts = parts_of(config, found)
    assert [stage.first_block for stage in found] == [part.blocks.start for part in parts]
    assert list(itertools.chain(*(part.blocks for part in parts))) == list(range(config.model.n_blocks))
    shapes = [parameter_shapes(config.model, part) for part in parts]
    assert dict(itertools.chain(*(of_part.items() for of_part in shapes))) == parameter_shapes(config.model)
    # Of a tied weight the last stage has a copy that no optimizer holds.
    assert sum(stage.optimizer_bytes for stage in found) == pytest.approx(12 * count_parameters(config.model).total)
    if model != "recomputed":
        whole = training_flops_per_token(config.model, config.training.sequence_length)
        assert sum(stage.flops for stage in found) == pytest.approx(whole)


@pytest.mark.parametrize("model", ["160m", "recomputed", "tied"])
@pytest.mark.parametrize("stages", [2, 3])
def test_no_other_cut_has_a_faster_slowest_stage_and_none_as_fast_needs_less_memory(model, stages):
    """Against all cuts there are."""
    config = configuration(*MODELS[model])
    shape, blocks = MeshShape(stages), config.model.n_blocks
    chosen = stage_costs(config, shape, Hardware())
    accounts = Accounts(config, shape, Hardware())
    others = [
        [accounts.cost(part, number) for number, part in enumerate(split(config.model, cuts))]
        for cuts in itertools.combinations(range(1, blocks), stages - 1)
    ]
    fastest = min(max(stage.flops for stage in cut) for cut in others)
    assert max(stage.flops for stage in chosen) <= fastest * (1 + TOLERANCE)
    as_fast = [cut for cut in others if max(stage.flops for stage in cut) <= fastest * (1 + TOLERANCE)]
    assert max(s.bytes for s in chosen) == pytest.approx(min(max(s.bytes for s in cut) for cut in as_fast))


def test_the_head_counts_as_the_blocks_that_it_takes_the_time_of():
    """The head of a small model with a large vocabulary is several blocks' work."""
    config = configuration("model=xlstm_160m")
    first, last = costs(config, 2)
    assert first.blocks > last.blocks
    assert first.flops / last.flops == pytest.approx(1, abs=0.25)


def test_earlier_stages_keep_the_activations_of_more_micro_batches():
    config = configuration("model=xlstm_160m", "model.vocab_size=512")
    four = costs(config, 4)
    assert [stage.blocks for stage in four] == [3, 3, 3, 3]
    assert [round(stage.activation_bytes / four[2].activation_bytes, 2) for stage in four[1:3]] == [1.5, 1.0]
    one_micro_batch = configuration("model=xlstm_160m", "model.vocab_size=512", "training.micro_batch_size=64")
    alone = costs(one_micro_batch, 4)
    assert alone[1].activation_bytes == alone[2].activation_bytes


def test_of_micro_batches_in_time_chunks_stages_keep_some_chunks_more_than_of_one():
    """Of 4 chunks the stages keep 7, 6, 5 and 4, where of whole micro-batches they keep 4, 3, 2 and 1."""
    config = configuration("model=xlstm_160m", "model.vocab_size=512", "training.time_chunk=512")
    whole = costs(configuration("model=xlstm_160m", "model.vocab_size=512"), 4)
    chunked = costs(config, 4)
    assert config.training.sequence_length == 4 * 512
    assert [Accounts(config, MeshShape(4), Hardware()).in_flight(stage) for stage in range(4)] == [7, 6, 5, 4]
    shares = [one.activation_bytes / other.activation_bytes for one, other in zip(chunked, whole, strict=True)]
    assert shares == pytest.approx([7 / 16, 6 / 12, 5 / 8, 4 / 4], rel=0.1)


def test_the_state_of_a_stage_is_shared_by_its_own_ranks():
    config = configuration("model=xlstm_160m")
    alone, shared = costs(config, 2), costs(config, 2, data=2, sequence=2)
    assert [stage.optimizer_bytes for stage in alone] == [4 * stage.optimizer_bytes for stage in shared]
    assert [stage.weight_bytes for stage in alone] == [stage.weight_bytes for stage in shared]


def test_the_bubble():
    assert bubble(1, 8) == 0 and bubble(2, 8) == pytest.approx(1 / 9) and bubble(4, 1) == pytest.approx(3 / 4)
    assert bubble(1, 8, 4) == 0 and bubble(4, 2, 4) == pytest.approx(3 / 11)


def test_the_plan_says_who_does_what_and_how_long_they_wait():
    config = configuration("model=xlstm_160m", "parallel.pipeline=2", "parallel.sequence=2")
    plan = make_plan(config, 8, "NVIDIA H100")
    assert (plan.replicas, plan.sequence_ranks, len(plan.stages)) == (2, 2, 2)
    assert plan.gradient_accumulation_steps == 4 and plan.bubble == pytest.approx(1 / 5)
    assert plan.rank_bytes == max(stage.bytes for stage in plan.stages)
    lines = plan.describe().splitlines()
    assert lines[1].startswith(
        "layout     8 x NVIDIA H100, 2 replicas of 2 pipeline stages of 2 sequence ranks with 1,024 tokens"
    )
    assert "2 stages, 4 micro-batches a step; each stage waits 20.0% of the time" in lines[2]
    assert lines[3].strip().startswith("stage 0: embedding, blocks 0 to ") and "% of the FLOPs, " in lines[3]
    assert lines[4].strip().startswith("stage 1: blocks ") and ", norm and head: " in lines[4]
    # The time that a step takes includes waiting for the slowest stage and for the pipeline to fill.
    plain = make_plan(configuration("model=xlstm_160m", "parallel.sequence=2"), 8, "NVIDIA H100")
    waits = slowest_against_mean(plan.stages) / (1 - 1 / 5)
    assert 1 <= slowest_against_mean(plan.stages) < 1.1
    assert plan.predicted_seconds == pytest.approx(plain.predicted_seconds * waits)
    assert "stages" not in plain.describe() and plain.bubble == 0


def test_the_plan_says_how_long_stages_wait_for_time_chunks():
    chunks = ["model=xlstm_160m", "parallel.pipeline=2", "training.micro_batch_size=16", "training.time_chunk=512"]
    plan = make_plan(configuration(*chunks), 2, "NVIDIA H100")
    assert plan.gradient_accumulation_steps == 4 and plan.bubble == pytest.approx(1 / 17)
    text = plan.describe()
    assert "2 stages, 4 micro-batches of 4 time chunks a step; each stage waits 5.9% of the time" in text
    assert "chunks     4 time chunks of 512 tokens; the first stage keeps up to 5 of them" in text
    # States between chunks stay where they are made.
    assert plan.host_state_bytes == 0 and plan.rank_bytes == max(stage.bytes for stage in plan.stages)
    whole = make_plan(configuration(*chunks, "training.time_chunk=null"), 2, "NVIDIA H100")
    waits = (1 - 1 / 5) / (1 - 1 / 17) * slowest_against_mean(plan.stages) / slowest_against_mean(whole.stages)
    assert plan.predicted_seconds == pytest.approx(whole.predicted_seconds * waits)
