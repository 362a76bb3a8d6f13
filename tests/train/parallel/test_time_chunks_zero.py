"""Time chunks under every ZeRO stage: DeepSpeed reduces the gradients of all of them, once."""

import pytest

from tests.runs import TINY_RUN
from tests.train.parallel.two_ways import check_two_ways

HYBRID = ["model.attention_at=[2]", "+model.attention.n_heads=4", "+model.attention.n_kv_heads=2"]


def check(tmp_path, cases, *overrides):
    ways = [["training.time_chunk=null"], ["training.time_chunk=12"]]
    check_two_ways(tmp_path, cases, ways, *TINY_RUN, *HYBRID, "training.z_loss_weight=1e-4", *overrides)


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one_pass(tmp_path):
    """ZeRO-1 is run through by tests/train/checkpoints/test_carry_state.py."""
    check(tmp_path, [(3, "fp32")])


@pytest.mark.slow
@pytest.mark.layouts
def test_two_ranks_have_the_gradients_of_one_pass_under_every_stage_and_precision(tmp_path):
    check(tmp_path, [(0, "fp32"), (1, "fp32"), (2, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")])


@pytest.mark.slow
@pytest.mark.layouts
def test_activation_checkpointing_inside_chunks_under_zero(tmp_path):
    check(tmp_path, [(1, "fp32"), (3, "fp32"), (3, "bf16")], "parallel.activation_checkpointing=block")
