"""Whoever has not entered a collective that others wait in is named."""

import ast
import dataclasses

import pytest

from tests.runs import ROOT, TINY_RUN, run_script
from train.parallel.flight_recorder import record_collectives
from train.watch.collectives import GroupRecord, as_json, describe_collectives, from_json

REDUCTION, GATHERING = "nccl:all_reduce of 4x2", "nccl:all_gather of 7"
DONE = GroupRecord("0 (default_pg)", [0, 1, 2, 3], 8, 8, {"8": GATHERING}, [])
WAITING = dataclasses.replace(DONE, entered=10, operations={"9": REDUCTION, "10": GATHERING})


@pytest.mark.slow
def test_a_rank_that_is_late_is_told_from_what_torch_records():
    done = run_script(ROOT / "tests" / "train" / "watch" / "recorded_ranks.py", [], processes=2)
    assert done.returncode == 0, done.stderr
    both, without_late = map(ast.literal_eval, done.stdout.splitlines())
    # Three sums; torch numbers a barrier too.
    entered = "process group 0 (default_pg): rank 0 entered #5, gloo:all_reduce of 5"
    # Of another group it may not have noticed yet that all is done.
    assert f"{entered}; rank 1 did not, the last there is #4, gloo:barrier" in both
    assert f"{entered}; of rank 1 nothing is known" in without_late


@pytest.mark.slow
@pytest.mark.layouts
@pytest.mark.parametrize(
    ("kind", "words"), [("sleep", "rank 1 did not, the last there is #"), ("stop", "of rank 1 nothing is known")]
)
def test_ranks_of_a_run_that_hangs_leave_what_was_recorded(small_corpus, tmp_path, kind, words):
    settings = [f"run_root={tmp_path}", f"corpus.directory={small_corpus}", *TINY_RUN, "name=run"]
    settings += ["training.total_steps=6", "watchdog.seconds=5"]
    script = ROOT / "tests" / "train" / "watch" / "recorded_train.py"
    assert run_script(script, ["1", kind, "3", *settings], processes=2).returncode == 1
    log = (tmp_path / "run" / "logs" / "rank-00000.log").read_text()
    assert "process group 0 (default_pg): rank 0 entered #" in log and words in log
    left = {path.name for path in (tmp_path / "run" / "logs").glob("nccl-*/*")}
    # One that was stopped may leave its own when it is let go on.
    assert left == {"rank-00000", "rank-00001"} or (kind, left) == ("stop", {"rank-00000"})


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
    # One that has not noticed yet that its last is done.
    late = dataclasses.replace(DONE, finished=7)
    (line,) = describe_collectives({0: [WAITING], 1: [late], 2: [WAITING], 3: [WAITING]}, 4)
    assert "ranks 0, 2-3 entered #9" in line and "rank 1 did not" in line


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
