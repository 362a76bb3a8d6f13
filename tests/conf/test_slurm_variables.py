"""What Slurm says of a process: which rank it is, where the others are, which task of an array."""

import os

import pytest

from conf.slurm_variables import StepTask, become_rank, hosts, job_end, job_identity, job_nodes, step_task

# As Slurm 22.05 sets them in the fourth task of `srun -N2 --ntasks-per-node=2`.
STEP = {
    "SLURM_JOB_ID": "11",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
}
BATCH = {name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP")} | {"SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("login", ["login"]),
        ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]),
        ("n[01-03,7],login", ["n01", "n02", "n03", "n7", "login"]),
        ("rack[1-2]n[098-100]", [f"rack{rack}n{node}" for rack in (1, 2) for node in ("098", "099", "100")]),
        ("a1-ib,b[2-3]-ib", ["a1-ib", "b2-ib", "b3-ib"]),
    ],
)
def test_lists_of_hosts(text, expected):
    assert hosts(text) == expected


def test_a_task_of_a_step_is_a_rank():
    task = step_task(STEP)
    assert task == StepTask(3, 4, 1, 2, "127.0.0.1", task.port)
    mixed = STEP | {"SLURM_STEP_TASKS_PER_NODE": "2,1(x2)", "SLURM_NODEID": "2"}
    assert step_task(mixed).local_size == 1


def test_ports_differ_between_attempts_steps_and_jobs():
    others = [{"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "12"}]
    ports = [step_task(STEP | other).port for other in [{}, *others]]
    assert len(set(ports)) == 4 and all(1024 < port < 32768 for port in ports)


@pytest.mark.parametrize("variables", [{}, BATCH, STEP | {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_process_alone_is_no_rank(variables):
    assert step_task(variables) is None
    before = dict(variables)
    become_rank(variables)
    assert variables == before


def test_what_torchrun_or_a_user_has_set_stays():
    under_torchrun = STEP | {"RANK": "0", "WORLD_SIZE": "1"}
    become_rank(under_torchrun)
    assert under_torchrun == STEP | {"RANK": "0", "WORLD_SIZE": "1"}
    chosen = STEP | {"MASTER_ADDR": "head-ib"}
    become_rank(chosen)
    ours = {name: chosen[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert list(ours.values()) == ["3", "4", "1", "2", "head-ib"]


def test_a_task_of_an_array_is_named_by_its_number():
    array = BATCH | {"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "14", "SLURM_ARRAY_TASK_ID": "3"}
    assert (job_identity({}), job_identity(BATCH), job_identity(array)) == (None, "11", "14_3")
    assert job_nodes(BATCH) == ["127.0.0.1", "127.0.0.2"] and job_nodes({}) == []


def test_the_end_of_the_time_is_known_where_slurm_says_it():
    assert job_end({"SLURM_JOB_END_TIME": "1796300000"}) == 1796300000.0
    assert [job_end({}), job_end(BATCH), job_end({"SLURM_JOB_END_TIME": "Unknown"})] == [None] * 3


def test_slurms_variables_are_read_in_one_place():
    from tests.test_architecture import FILES

    reading = [path.name for path in FILES if '"SLURM' in path.read_text(encoding="utf-8")]
    assert reading == ["slurm_variables.py"] and "SLURM_STEP_ID" not in os.environ
