"""From a command to a job: which settings are of the machines, what is refused, what the batch script says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from conf import ConfigError
from launch import slurm
from launch.folder import LaunchFolder
from launch.job import read_job, seconds_of
from launch.script import ArrayPlace, Place, render
from launch.submit import Submission, submit

RUN = ["name=big", "model=tiny", "corpus.directory=corpora/x", "training.total_steps=1000", "schedule=cosine"]
MACHINES = ["nodes=2", "gpus_per_node=4"]
PYXIS = ["launch.container.kind=pyxis", "launch.container.image='nvcr.io#nvidia/pytorch:25.10-py3'"]
APPTAINER = [
    "launch.container.kind=apptainer",
    "launch.container.image=/images/torch 2.sif",
    "launch.container.mounts=['/data:/data']",
]
VARIANTS = {
    "plain": [],
    "chain": ["launch.continuation=chain", "launch.time=12:00:00"],
    "unchecked": ["launch.preflight.seconds=0", "launch.cpus_per_task=8"],
    "pyxis": PYXIS,
    "pyxis chain": [*PYXIS, "launch.continuation=chain", "launch.preflight.all_reduce_mib=0"],
    "apptainer": APPTAINER,
    "of a site": [
        "launch.partition=gpu",
        "launch.account=lab",
        "launch.qos=long",
        "launch.constraint=h200",
        "launch.mail=me@example.org",
        "launch.options=['--switches=1']",
        "launch.setup=['module load cuda/12.8']",
        "+launch.environment.NCCL_IB_HCA='mlx5_0,mlx5_1 of us'",
    ],
}


def script_of(tmp_path: Path, *settings: str) -> str:
    job, config = read_job([*MACHINES, *RUN, *settings])
    return render(job, config.name, Place(LaunchFolder(tmp_path / "my runs" / "big"), tmp_path))


def array_script_of(tmp_path: Path, *settings: str) -> str:
    job, _ = read_job([*MACHINES, *RUN, *settings])
    return render(job, "many", ArrayPlace(tmp_path / "my sweeps", tmp_path / "my sweeps" / "launch" / "0001", tmp_path))


def test_settings_of_machines_are_told_from_those_of_the_run():
    job, config = read_job([*MACHINES, "launch.time=1-00", *RUN, "training.global_batch_size=64"])
    assert (job.processes, job.processes_per_node, job.machines.launch.time) == (8, 4, "1-00")
    assert job.overrides == [*RUN, "training.global_batch_size=64"] and config.training.global_batch_size == 64
    job, _ = read_job(["nodes=3", "gpus_per_node=0", "processes_per_node=2", *RUN, "training.global_batch_size=24"])
    assert job.processes == 6


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["nodes=0"], "nodes: must be at least 1"),
        (["gpus_per_node=0"], "processes_per_node: null means one for each GPU, and gpus_per_node is 0; set"),
        (
            ["processes_per_node=5"],
            "processes_per_node: 5 processes do not find a GPU each on a node of gpus_per_node=4",
        ),
        (["launch.time=soon"], r"launch.time: no time as Slurm writes it \(soon\)"),
        (["launch.time=00:04:00"], "launch.signal_seconds: 300 s before the end of 00:04:00"),
        (["launch.continuation=pray"], "launch.continuation: no such choice"),
        (["launch.partiton=gpu"], "launch.partiton: no such key .did you mean 'launch.partition'"),
        (["launch=nowhere"], "conf/launch/ has no such file"),
        (["launch.gpu=h300"], "launch.gpu: no such calibration .*h100.*h200"),
        (["launch.container.kind=pyxis"], "launch.container.image: null, and pyxis needs one"),
        ([*PYXIS, "launch.container.mounts=[data]"], r"launch.container.mounts: HOST:CONTAINER is wanted \(data\)"),
        (["launch.account=two words"], "launch.account: a word without spaces is wanted"),
        (["+launch.environment.NOT-A-NAME=1"], "launch.environment: no name of a variable"),
        (["launch.options=[exclusive]"], "launch.options: an option of sbatch in one line is wanted"),
    ],
)
def test_what_cannot_work_is_refused(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        read_job([*MACHINES, *RUN, *settings])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["nodes=3"], "training.global_batch_size: 8 samples do not divide into passes of 1"),
        (["parallel.pipeline=3"], "parallel.pipeline: 8 processes do not divide into replicas of 3 stages"),
        (["corpus.directory=nowhere"], "nowhere"),
    ],
)
def test_a_run_that_does_not_fit_its_machines_is_refused(tiny_run, settings, problem):
    run = [*tiny_run, "training.total_steps=4", "training.micro_batch_size=1"]
    with pytest.raises(ConfigError, match=problem):
        submit(Submission([*MACHINES, *run, *settings], dry_run=True))


def test_problems_of_machines_and_of_the_run_are_told_together():
    with pytest.raises(ConfigError) as told:
        read_job(["nodes=0", "launch.chain=0", *RUN, "training.total_step=1"])
    assert len(told.value.problems) == 3 and "did you mean 'training.total_steps'" in str(told.value)


@pytest.mark.parametrize("script_of", [script_of, array_script_of])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_scripts_are_sound(tmp_path, settings, script_of):
    script = tmp_path / "script"
    script.write_text(script_of(tmp_path, *settings))
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_the_check_of_nodes_is_sound():
    preflight = Path(slurm.__file__).parents[1] / "slurm" / "preflight.sh"
    subprocess.run(["bash", "-n", preflight], check=True)
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", preflight], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_each_task_of_an_array_is_a_run_of_its_own(tmp_path):
    script = array_script_of(tmp_path, "launch.container.kind=apptainer", "launch.container.image=x.sif")
    assert f'#SBATCH --output="{tmp_path}/my sweeps/launch/0001/slurm-%A_%a.out"' in script
    # What a task asks of Slurm, or has queued again, is itself and not the array.
    assert "job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" in script and "$SLURM_JOB_ID" not in script
    assert 'scontrol requeue "$job"' in script and 'scontrol show job "$job"' in script
    assert f"--bind '{tmp_path}/my sweeps:{tmp_path}/my sweeps'" in script


def test_what_a_script_asks_for(tmp_path):
    head = [line for line in script_of(tmp_path, *VARIANTS["of a site"]).splitlines() if line.startswith("#SBATCH")]
    for option in (
        "nodes=2",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "signal=USR1@300",
        "partition=gpu",
        "account=lab",
        "qos=long",
        "constraint=h200",
        "mail-user=me@example.org",
        "open-mode=append",
        "exclusive",
        "mem=0",
        "requeue",
        "switches=1",
        f'output="{tmp_path}/my runs/big/logs/slurm-%j.out"',
    ):
        assert f"#SBATCH --{option}" in head, head
    script = script_of(tmp_path, *VARIANTS["of a site"])
    assert "\nmodule load cuda/12.8\n" in script and "export NCCL_IB_HCA='mlx5_0,mlx5_1 of us'" in script
    assert "--no-requeue" in script_of(tmp_path, "launch.continuation=chain")


def test_steps_are_started_in_the_container(tmp_path):
    pyxis = script_of(tmp_path, *PYXIS)
    assert pyxis.count("--container-image=nvcr.io#nvidia/pytorch:25.10-py3") == 4
    assert f"--container-mounts={tmp_path}:{tmp_path},{tmp_path}/my runs/big:" in pyxis
    assert "python=(python3)" in pyxis and "alone=(srun --nodes=1" in pyxis
    apptainer = script_of(tmp_path, *APPTAINER)
    assert apptainer.count("apptainer exec --nv") == 4 and "--bind /data:/data" in apptainer
    assert "'/images/torch 2.sif' \"${python[@]}\" -m train" in apptainer


def test_a_dry_run_prints_the_script_and_writes_nothing(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "nowhere")
    assert (
        submit(
            Submission([*MACHINES, *tiny_run, "training.total_steps=4", "training.micro_batch_size=1"], dry_run=True)
        )
        == 0
    )
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/bin/bash\n#SBATCH --job-name=run\n")
    assert "8 x GPU, 8 replicas" in printed.err and "time  " not in printed.err
    assert "nothing was written or submitted" in printed.err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="sinfo is not on this machine; log in where jobs are submitted"):
        submit(Submission([*MACHINES, *tiny_run, "training.total_steps=4", "training.micro_batch_size=1"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "device", "has_time"),
    [
        (["launch.gpu=h200", "precision=bf16"], "8 x NVIDIA H200", True),
        (["launch.gpu=h200"], "8 x NVIDIA H200", False),
        (["gpus_per_node=0", "processes_per_node=4"], "8 x CPU", False),
    ],
)
def test_the_plan_is_for_the_machines_that_compute_the_run(tiny_run, capsys, settings, device, has_time):
    run = [*tiny_run, "training.total_steps=4", "training.micro_batch_size=1", *settings]
    assert submit(Submission([*MACHINES, *run], dry_run=True)) == 0
    told = capsys.readouterr().err
    assert f"layout     {device}" in told and ("tokens/s a GPU" in told) == has_time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("UNLIMITED", None), ("", None)],
)
def test_times_as_slurm_writes_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("resources", "gpus"),
    [
        ("(null)", 0),
        ("gpu:2", 2),
        ("gpu:h100:8(S:0-1)", 8),
        ("nvme:1,gpu:a:2,gpu:b:4", 6),
        ("gpu:h100:4,shard:h100:16", 4),
    ],
)
def test_gpus_of_a_node(resources, gpus):
    assert slurm.gpus_of(resources) == gpus
