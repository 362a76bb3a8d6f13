"""A chain of stages computes what the whole model computes, bit for bit."""

import copy

import pytest
import torch

from conf import CONF_DIR
from model import statistics
from model.initialisation import initialise
from model.language_model import LanguageModel
from model.parameters import parameter_shapes
from model.parts import Part, split
from model.presets import preset
from model.recomputation import ACTIVATION_CHECKPOINTING
from model.stages import Stage
from model.state import ModelState


def stages_of(model: LanguageModel, parts: list[Part]) -> list[Stage]:
    """Stages with the values of `model`."""
    weights = dict(model.named_parameters())
    stages = []
    for part in parts:
        stage = Stage(model.config, part).to(next(model.parameters()).dtype)
        stage.activation_checkpointing = model.activation_checkpointing
        with torch.no_grad():
            for name, parameter in stage.named_parameters():
                parameter.copy_(weights[name])
        stages.append(stage)
    return stages


def run_chain(stages, tokens, targets=None, document_start=None, state=None, **settings):
    """The output of the last stage with the states of all, and what passed between them."""
    x, given, new_states = tokens, 0, []
    passed = []
    for stage in stages:
        count = len(stage.blocks)
        part = None if state is None else ModelState(state.blocks[given : given + count])
        output = stage(
            x,
            targets=targets if stage.part.head else None,
            document_start=document_start,
            state=part,
            **settings,
        )
        given += count
        if output.state is not None:
            new_states += output.state.blocks
        x = output.hidden
        passed.append(x)
    return output, new_states, passed


def tensors(states) -> list[torch.Tensor]:
    found = []
    ModelState(states).map(lambda tensor: found.append(tensor) or tensor)
    return found


@pytest.mark.parametrize("mode", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("cuts", [[1], [0, 2], [1, 2]], ids=str)
def test_a_chain_is_the_model_bit_for_bit(config, make_model, make_batch, cuts, mode):
    cuts = [min(cut, config.n_blocks) for cut in cuts]
    model, batch = make_model(config, torch.float32), make_batch()
    model.activation_checkpointing = mode
    stages = stages_of(model, split(config, cuts))
    settings = {"loss_reduction": "sum", "z_loss_weight": 1e-4, "return_state": True}
    early = {key: value[:, :12] for key, value in batch.items()}
    late = {key: value[:, 12:] for key, value in batch.items()}
    expected_early = model(early.pop("tokens"), **early, **settings)
    expected = model(late.pop("tokens"), state=expected_early.state, **late, **settings)
    expected.loss_sum.backward()

    early = {key: value[:, :12] for key, value in batch.items()}
    late = {key: value[:, 12:] for key, value in batch.items()}
    _, states, _ = run_chain(stages, **early, **settings)
    output, new_states, _ = run_chain(stages, state=ModelState(states), **late, **settings)
    output.loss_sum.backward()

    assert torch.equal(output.loss_sum, expected.loss_sum)
    for ours, theirs in zip(tensors(new_states), tensors(expected.state.blocks), strict=True):
        assert torch.equal(ours, theirs)
    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients[name] + parameter.grad if name in gradients else parameter.grad
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name == "embedding.weight" and config.tie_embeddings:
            # Two copies add up in another order than the two uses of one.
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(gradients[name], parameter.grad), name


def test_logits_and_statistics_are_those_of_the_model(config, make_model, make_batch):
    model, batch = make_model(config), make_batch()
    batch.pop("targets")
    with torch.no_grad(), statistics.recording() as expected:
        logits = model(batch["tokens"], document_start=batch["document_start"]).logits
    with torch.no_grad(), statistics.recording() as recorded:
        output, _, passed = run_chain(stages_of(model, split(config, [1])), **batch)
    assert torch.equal(output.logits, logits)
    assert [x.shape for x in passed if x is not None] == [(2, 29, 32)]
    assert list(recorded.values()) == list(expected.values())
    for name, (_, value) in expected.values().items():
        assert torch.equal(recorded.values()[name][1], value), name


def test_a_stage_begins_with_the_values_of_the_whole_model(config):
    whole = LanguageModel(config)
    initialise(whole, seed=3)
    values = dict(whole.named_parameters())
    for part in split(config, [1]):
        stage = Stage(config, part)
        initialise(stage, seed=3)
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, values[name]), name


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml")))
def test_shapes_of_every_part_follow_from_the_configuration(name):
    config = preset(name)
    cuts = [config.n_blocks // 3, 2 * config.n_blocks // 3]
    for part in split(config, cuts):
        with torch.device("meta"):
            stage = Stage(config, part)
        assert list(parameter_shapes(config, part).items()) == [
            (n, tuple(p.shape)) for n, p in stage.named_parameters()
        ]


def test_parts_together_have_every_parameter_once_but_for_a_tied_embedding(config):
    parts = split(config, [1])
    names = [name for part in parts for name in parameter_shapes(config, part)]
    copies = 2 if config.tie_embeddings else 1
    assert names.count("embedding.weight") == copies
    assert sorted(set(names)) == sorted(parameter_shapes(config))
    assert len(names) == len(set(names)) + copies - 1


def test_a_tied_stage_with_the_head_reads_its_own_copy(small_configs, make_model, make_batch):
    config = small_configs["hybrid"]
    first, last = stages_of(make_model(config), split(config, [2]))
    assert last.embedding.weight is last.lm_head.weight and last.embedding.weight is not first.embedding.weight
    assert "lm_head.weight" not in dict(last.named_parameters())
    tokens = make_batch()["tokens"]
    before = run_chain([first, last], tokens)[0].logits
    with torch.no_grad():
        last.embedding.weight.zero_()
    assert run_chain([first, last], tokens)[0].logits.abs().max() < before.abs().max()


def test_a_stage_copies(small_configs, make_model):
    stage = stages_of(make_model(small_configs["mlstm"]), split(small_configs["mlstm"], [1]))[1]
    copied = copy.deepcopy(stage)
    assert list(copied.state_dict()) == list(stage.state_dict()) and copied.blocks[1].kind == "mlstm"


def test_cuts_and_inputs_that_do_not_fit_are_refused(small_configs):
    config = small_configs["mlstm"]
    for cuts in ([2, 1], [3], [-1]):
        with pytest.raises(ValueError, match="do not ascend between 0 and n_blocks = 2"):
            split(config, cuts)
    first, last = (Stage(config, part) for part in split(config, [1]))
    with pytest.raises(ValueError, match=r"without the embedding takes hidden states \[B, S, 32\], got int64 \(1, 3\)"):
        last(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="targets were given to a stage without the head"):
        first(torch.zeros(1, 3, dtype=torch.int64), targets=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="state is of a stage with 2 blocks, this stage has 1"):
        first(torch.zeros(1, 3, dtype=torch.int64), state=ModelState([None, None]))
