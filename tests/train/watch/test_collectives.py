"""Whoever has not entered a collective that others wait in is named."""

import ast
import dataclasses

import pytest

from tests.runs import ROOT, run_script
from train.parallel.flight_recorder import record_collectives
from train.watch.collectives import GroupRecord, as_json, describe_collectives, from_json

REDUCTION, GATHERING = "nccl:all_reduce of 4x2", "nccl:all_gather of 7"
DONE = GroupRecord("0 (default_pg)", [0, 1, 2, 3], 8, 8, {"8": GATHERING}, [])
WAITING = dataclasses.replace(DONE, entered=10, operations={"9": REDUCTION, "10": GATHERING})


@pytest.mark.slow
def test_a_rank_that_is_late_is_told_from_what_torch_records():
    done = run_script(ROOT / "tests" / "train" / "watch" / "recorded_ranks.py", [], processes=2)
    assert done.returncode == 0, done.stderr
    both, without_late, late_alone = map(ast.literal_eval, done.stdout.splitlines())
    # Three sums; torch numbers a barrier too.
    entered = "process group 0 (default_pg): rank 0 entered #5, gloo:all_reduce of 5"
    assert both == [f"{entered}; rank 1 did not, the last there is #4, gloo:barrier"]
    assert without_late == [f"{entered}; of rank 1 nothing is known"]
    assert late_alone == []


def test_ranks_that_wait_and_those_that_did_not_come():
    (line,) = describe_collectives({0: [WAITING], 1: [DONE], 3: [WAITING]}, 4)
    assert line == (
        f"process group 0 (default_pg): ranks 0, 3 entered #9, {REDUCTION}; rank 1 did not, the last there is #8, "
        f"{GATHERING}; of rank 2 nothing is known"
    )
    assert describe_collectives({rank: [WAITING] for rank in range(4)}, 4) == [
        f"process group 0 (default_pg): ranks 0-3 entered #9, {REDUCTION}"
    ]
    assert describe_collectives({rank: [DONE] for rank in range(3)}, 4) == []


def test_only_members_of_a_group_are_missed_there():
    stage = dataclasses.replace(WAITING, group="2 (stage)", ranks=[2, 3])
    assert describe_collectives({0: [DONE], 1: [DONE], 2: [DONE, stage]}, 4) == [
        f"process group 2 (stage): rank 2 entered #9, {REDUCTION}; of rank 3 nothing is known"
    ]


def test_a_stage_that_waits_for_another_is_named_with_the_transfer():
    receiving = dataclasses.replace(DONE, transfers=["nccl:recv 1<-0 of 32x16"])
    assert describe_collectives({0: [DONE], 1: [receiving]}, 2) == [
        "process group 0 (default_pg): rank 1 waits in nccl:recv 1<-0 of 32x16"
    ]


def test_records_are_read_as_they_were_told():
    assert from_json(as_json([DONE, WAITING])) == [DONE, WAITING]


def test_torch_records_unless_the_environment_says_how():
    variables = {}
    assert record_collectives(variables) == list(variables) and set(variables.values()) == {"2000"}
    for name in list(variables):
        own = {name: "0"}
        assert record_collectives(own) == [] and own == {name: "0"}
