"""Decay groups, AdamW settings, and the step that is skipped without a trace."""

import dataclasses
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import conf
from train.__main__ import end_process
from train.optimizer import (
    OptimizerConfig,
    SkippableAdamW,
    build_optimizer,
    is_decayed,
    parameter_groups,
    validate_optimizer,
)

SETTINGS = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "blocks.0.mixer.q_proj.weight",
        "blocks.0.mixer.igate.weight",
        "blocks.0.mixer.conv.weight",
        "blocks.3.mixer.zgate_proj.weight",
        "blocks.0.ffn.down_proj.weight",
    ],
)
def test_dense_weights_decay(name):
    assert is_decayed(name)
    assert is_decayed(f"model.{name}")


@pytest.mark.parametrize(
    "name",
    [
        "embedding.weight",
        "model.embedding.weight",
        "out_norm.weight",
        "blocks.0.mixer_norm.weight",
        "blocks.0.mixer.head_norm.weight",
        "blocks.0.mixer.igate.bias",
        "blocks.0.mixer.conv.bias",
        "blocks.0.mixer.bias",
        "blocks.0.mixer.recurrent_kernel",
        "blocks.0.mixer.learnable_skip",
    ],
)
def test_everything_else_does_not_decay(name):
    assert not is_decayed(name)


def test_groups_hold_every_trained_parameter_once_and_no_empty_group():
    weight, bias, frozen = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad_(False)
    groups = parameter_groups([("a.weight", weight), ("a.bias", bias), ("b.weight", frozen)], OptimizerConfig())
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decayed", 0.1), ("not_decayed", 0.0)]
    assert groups[0]["params"] == [weight]
    assert groups[1]["params"] == [bias]
    assert [group["name"] for group in parameter_groups([("a.bias", bias)], OptimizerConfig())] == ["not_decayed"]


@pytest.mark.parametrize("name, eps", [("adamw", 1e-8), ("adamw_neurips", 1e-5)])
def test_presets_are_valid(name, eps):
    from omegaconf import OmegaConf

    config = conf.to_dataclass(OptimizerConfig, OmegaConf.load(conf.CONF_DIR / "optimizer" / f"{name}.yaml"))
    assert validate_optimizer(config) == []
    assert config.eps == eps
    assert config.betas == [0.9, 0.95]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 0.0}, "optimizer.learning_rate: must be above 0 (0.0)"),
        ({"learning_rate": math.nan}, "optimizer.learning_rate: must be above 0 (nan)"),
        ({"betas": [0.9]}, "optimizer.betas: two numbers in 0..1, without 1, are expected ([0.9])"),
        ({"betas": [0.99, 1.0]}, "optimizer.betas: two numbers"),
        ({"eps": 0.0}, "optimizer.eps: must be above 0 (0.0)"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay: must not be negative (-0.1)"),
        ({"gradient_clipping": 0.0}, "optimizer.gradient_clipping: must be above 0 (0.0); write null"),
    ],
)
def test_each_mistake_has_its_message(changes, message):
    problems = validate_optimizer(dataclasses.replace(OptimizerConfig(), **changes))
    assert len(problems) == 1
    assert problems[0].startswith(message)


def parameters_and_gradients(seed: int) -> tuple[list[torch.nn.Parameter], list[list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (7,))]
    gradients = [[torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(5)]
    return parameters, gradients


def apply(optimizer: torch.optim.Optimizer, parameters, gradients) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("skipped_before", [0, 3])
def test_steps_are_bitwise_those_of_torch_and_skipped_ones_leave_no_trace(skipped_before):
    ours, gradients = parameters_and_gradients(0)
    theirs, _ = parameters_and_gradients(0)
    optimizer, reference = SkippableAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    poisoned = [torch.full_like(gradient, math.nan) for gradient in gradients[0]]
    for index, gradient in enumerate(gradients):
        if index == skipped_before:
            optimizer.skip_step = True
            apply(optimizer, ours, poisoned)
            optimizer.skip_step = False
            assert bool(optimizer.state) == (skipped_before > 0)
        apply(optimizer, ours, gradient)
        apply(reference, theirs, gradient)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a]["step"] == reference.state[b]["step"] == len(gradients)
        assert torch.equal(optimizer.state[a]["exp_avg"], reference.state[b]["exp_avg"])
        assert torch.equal(optimizer.state[a]["exp_avg_sq"], reference.state[b]["exp_avg_sq"])


def test_build_optimizer_uses_the_configuration():
    model = torch.nn.Linear(3, 3)
    config = OptimizerConfig(learning_rate=1e-3, betas=[0.8, 0.9], eps=1e-5, weight_decay=0.2)
    optimizer = build_optimizer(model.named_parameters(), config)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert {(group["lr"], group["betas"], group["eps"]) for group in optimizer.param_groups} == {
        (1e-3, (0.8, 0.9), 1e-5)
    }
    assert not optimizer.defaults["fused"]


# bf16 starts at ZeRO-1: without it DeepSpeed has no optimizer that accumulates gradients in fp32.
LAYOUTS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
POISONED_STEP = 2


def _train_with_deepspeed(stage: int, precision: str, steps: list[int], poison: bool) -> list[torch.Tensor]:
    """Weights after `steps` of a small model; with `poison`, step POISONED_STEP has NaN on rank 1 and is skipped."""
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 2**62,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(learning_rate=0.05))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    for step in steps:
        inputs = torch.randn(2, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        optimizer.skip_step = poison and step == POISONED_STEP
        if optimizer.skip_step and dist.get_rank() == 1:
            inputs[0, 0] = math.nan
        engine.backward(engine(inputs.to(next(engine.module.parameters()).dtype)).float().square().mean())
        engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        weights = [parameter.detach().float().clone() for parameter in engine.module.parameters()]
    engine.destroy()
    return weights


def _compare_skipped_with_absent(rank: int, world_size: int, store: str) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    import deepspeed

    # Without this, init builds a C++ extension that nothing here uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    for stage, precision in LAYOUTS:
        skipped = _train_with_deepspeed(stage, precision, [0, 1, 2, 3], poison=True)
        absent = _train_with_deepspeed(stage, precision, [0, 1, 3], poison=False)
        for a, b in zip(skipped, absent, strict=True):
            assert torch.equal(a, b), f"ZeRO-{stage} {precision}: a skipped step left a trace"
    dist.destroy_process_group()
    end_process(0)


@pytest.mark.slow
def test_a_skipped_step_leaves_no_trace_under_any_zero_stage(tmp_path):
    multiprocessing.spawn(_compare_skipped_with_absent, (2, str(tmp_path / "store")), nprocs=2)
