"""A run that may not fit is warned of before its start, with both numbers and what to change."""

import dataclasses

import pytest

from model.memory import state_bytes
from model.presets import preset
from train.config import LoggingConfig, RunConfig, TrainingConfig
from train.memory_check import CPU_FACTOR, PROCESS_BYTES, Room, control_group_bytes, memory_warnings
from train.plan import make_plan

GIB = 2.0**30


def planned(world_size=1, rank_gib=15.3, **parallel):
    config = RunConfig(
        name="x", model=preset("tiny"), training=TrainingConfig(total_steps=1, global_batch_size=8, micro_batch_size=4)
    )
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **parallel))
    plan = make_plan(config, world_size, "CPU")
    rest = rank_gib * GIB - plan.weight_bytes - plan.gradient_bytes - plan.optimizer_bytes
    plan = dataclasses.replace(plan, activation_bytes=rest)
    assert plan.rank_bytes == pytest.approx(rank_gib * GIB)
    return config, plan


def test_a_run_that_fits_is_not_warned_of():
    room = Room(host_bytes=(15.3 * CPU_FACTOR + 1) * GIB, device_bytes=None, ranks=1)
    assert memory_warnings(*planned(), room) == []


def test_a_host_that_the_plan_fits_but_its_peak_does_not_is_warned_of():
    """15.3 GiB by the plan on a machine of 23: the process was killed at 22.7."""
    (line,) = memory_warnings(*planned(), Room(host_bytes=22.7 * GIB, device_bytes=None, ranks=1))
    assert "may not fit into memory: by the plan the run's process needs 15.80 GiB, up to about 23.45 GiB" in line
    assert "22.70 GiB are available on this machine" in line
    for key in (
        "training.micro_batch_size (4)",
        "parallel.activation_checkpointing=block (none)",
        "processes with parallel=zero3",
    ):
        assert key in line


def test_the_ranks_of_a_machine_share_it_and_its_control_group_limits_them():
    config, plan = planned(world_size=8, rank_gib=2.0, zero_stage=1)
    room = Room(host_bytes=7 * GIB, device_bytes=None, ranks=4, is_limited=True)
    (line,) = memory_warnings(config, plan, room)
    assert "does not fit into memory: by the plan 4 ranks need 10.00 GiB" in line
    assert "7.00 GiB are left below the memory limit of this container or job" in line
    assert "shard more with parallel=zero3 (zero1)" in line


def test_a_gpu_is_warned_of_by_itself_and_the_host_by_what_checkpoints_copy_there():
    config, plan = planned(rank_gib=90.0, activation_checkpointing="block")
    (line,) = memory_warnings(config, plan, Room(host_bytes=100 * GIB, device_bytes=78 * GIB, ranks=1))
    assert "a rank needs 90.00 GiB" in line and "78.00 GiB are free on its GPU" in line
    assert "activation_checkpointing" not in line
    plan = dataclasses.replace(plan, activation_bytes=0.0)
    tight = Room(host_bytes=plan.checkpoint_bytes + PROCESS_BYTES - 1, device_bytes=78 * GIB, ranks=1)
    (line,) = memory_warnings(config, plan, tight)
    assert "available on this machine" in line and "micro_batch_size" not in line


def test_the_states_between_time_chunks_wait_in_the_memory_of_the_host():
    training = TrainingConfig(
        sequence_length=4096, time_chunk=64, total_steps=1, global_batch_size=8, micro_batch_size=4
    )
    config = RunConfig(name="x", model=preset("tiny"), training=training)
    on_gpu, on_cpu = make_plan(config, 1, "NVIDIA H100"), make_plan(config, 1, "CPU")
    assert on_gpu.host_state_bytes > 0 == on_cpu.host_state_bytes
    assert "64 time chunks of 64 tokens" in on_gpu.describe()
    whole = dataclasses.replace(config, training=dataclasses.replace(training, time_chunk=None))
    assert on_cpu.activation_bytes < make_plan(whole, 1, "CPU").activation_bytes / 4
    host = on_gpu.checkpoint_bytes + PROCESS_BYTES
    tight = Room(host_bytes=host + on_gpu.host_state_bytes - 1, device_bytes=78 * GIB, ranks=1)
    assert len(memory_warnings(config, on_gpu, tight)) == 1
    enough = dataclasses.replace(tight, host_bytes=host + on_gpu.host_state_bytes)
    assert memory_warnings(config, on_gpu, enough) == []
    (line,) = memory_warnings(
        whole, make_plan(whole, 1, "CPU"), dataclasses.replace(enough, device_bytes=None, host_bytes=1)
    )
    assert "train less than 4096 tokens at a time with training.time_chunk" in line


def test_the_rows_of_a_rank_and_of_a_checkpoint_carry_their_states():
    training = TrainingConfig(total_steps=1, global_batch_size=8, micro_batch_size=2)
    config = RunConfig(name="x", model=preset("tiny_mlstm"), training=training)
    carrying = dataclasses.replace(config, training=dataclasses.replace(training, carry_state=True))
    plain, plan = make_plan(config, 2, "CPU"), make_plan(carrying, 2, "CPU")
    of_row = state_bytes(config.model, cache_dtype_bytes=2)
    assert plan.carried_bytes == plan.rank_bytes - plain.rank_bytes == 4 * of_row
    assert plan.checkpoint_bytes - plain.checkpoint_bytes == 8 * of_row
    assert "carried state" in plan.describe() and "carried state" not in plain.describe()


def write(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(value)


def test_the_tightest_control_group_counts_less_what_is_used_but_not_what_only_caches_files(tmp_path):
    root, process = tmp_path / "cgroup", tmp_path / "self"
    process.write_text("0::/job/step\n")
    write(root / "job/step", memory__max="max\n", memory__current="5\n", memory__stat="inactive_file 0\n")
    write(root / "job", memory__max="1000\n", memory__current="700\n", memory__stat="anon 1\ninactive_file 150\n")
    assert control_group_bytes(root, process) == 450
    process.write_text("0::/elsewhere\n")
    assert control_group_bytes(root, process) == float("inf")
    assert control_group_bytes(root, tmp_path / "none") == float("inf")


def test_control_groups_of_version_1_count_too_and_a_container_sees_its_own_as_the_root(tmp_path):
    root, process = tmp_path / "cgroup", tmp_path / "self"
    process.write_text("9:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    write(
        root / "memory",
        memory__limit_in_bytes="2000\n",
        memory__usage_in_bytes="500\n",
        memory__stat="inactive_file 1\ntotal_inactive_file 100\n",
    )
    assert control_group_bytes(root, process) == 1600


def test_this_machine_has_room():
    room = Room.here(world_size=2)
    assert room.host_bytes > 0 and room.ranks == 2


def test_what_cuda_graphs_hold_counts_beside_a_pass_with_statistics():
    training = TrainingConfig(total_steps=1000, global_batch_size=8, micro_batch_size=8)
    config = RunConfig(name="x", model=preset("xlstm_400m"), training=training)
    plan = make_plan(config, 1, "NVIDIA H200")
    # Recorded passes keep what compiled blocks keep; the pass with statistics is written.
    kept = plan.activation_bytes - plan.logit_bytes
    assert 0.7 * kept < plan.graph_bytes < kept
    room = Room(host_bytes=500 * GIB, device_bytes=plan.rank_bytes + plan.graph_bytes / 2, ranks=1)
    assert "does not fit" in memory_warnings(config, plan, room)[0]
    unwatched = dataclasses.replace(config, logging=LoggingConfig(monitor_interval=0))
    uncaptured = dataclasses.replace(config, training=dataclasses.replace(training, cuda_graphs=False))
    for other in (unwatched, uncaptured):
        assert make_plan(other, 1, "NVIDIA H200").graph_bytes == 0
    # Without statistics all passes are those of compiled blocks.
    assert make_plan(unwatched, 1, "NVIDIA H200").activation_bytes < 0.95 * plan.activation_bytes
