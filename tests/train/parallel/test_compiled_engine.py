"""Compiled blocks under every ZeRO stage: the same losses and gradients, with monitors and evaluation in between."""

import pytest

from tests.runs import TINY_RUN
from tests.train.parallel.two_ways import check_two_ways

# Of the sLSTM the loop that runs on a CPU is not compiled; on a GPU it is an operator.
MODEL = [
    *(setting for setting in TINY_RUN if "slstm" not in setting),
    "model.slstm_at=[]",
    "model.slstm=null",
    "model.attention_at=[2]",
    "+model.attention.n_heads=4",
    "+model.attention.n_kv_heads=2",
]
# One replica, so that a step has two micro-batches.
SEQUENCE = ["parallel.sequence=2", "training.global_batch_size=4"]
WAYS = [["training.compile=false"], ["training.compile=true"]]


def check(tmp_path, cases, *overrides):
    check_two_ways(tmp_path, cases, WAYS, *MODEL, *overrides)


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_have_the_gradients_of_blocks_as_written(tmp_path):
    check(tmp_path, [(1, "fp32")])


@pytest.mark.slow
@pytest.mark.layouts
@pytest.mark.parametrize("mode", ["none", "unit", "block"])
def test_every_stage_precision_and_recomputation(tmp_path, mode):
    cases = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
    check(tmp_path, cases, f"parallel.activation_checkpointing={mode}")


@pytest.mark.slow
@pytest.mark.long
def test_sequence_ranks_exchange_between_the_graphs_of_a_block(tmp_path):
    check(tmp_path, [(1, "fp32")], *SEQUENCE)


@pytest.mark.slow
@pytest.mark.layouts
@pytest.mark.parametrize("mode", ["none", "unit", "block"])
def test_sequence_ranks_under_every_stage_precision_and_recomputation(tmp_path, mode):
    cases = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
    check(tmp_path, cases, *SEQUENCE, f"parallel.activation_checkpointing={mode}")
