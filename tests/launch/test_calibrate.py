"""`python -m launch calibrate`: on tiny shapes of a CPU, as on a GPU but for what they say of one."""

import json
import os
import subprocess
import sys

import pytest
import torch

from launch.__main__ import main
from launch.calibrate import full_program
from launch.measuring.steps import run_config
from launch.planner.errors import compared_steps
from model.layers import layer_kinds
from tests.runs import ROOT
from train.estimate.calibration import read_calibration
from train.estimate.coefficients import fit
from train.plan import make_plan


def calibrate(folder, *arguments, processes=1):
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "launch", "calibrate", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.long
def test_a_file_is_measured_and_processes_add_their_collectives_to_it(tmp_path):
    said = calibrate(tmp_path, "output=cpu.json", "tiny=true")
    assert "measured   tiny_mlstm with 3 blocks, 1 x 64, written, recomputing block" in said
    measured = read_calibration(tmp_path / "cpu.json")
    assert (measured.device, measured.collectives, measured.runs) == ("CPU", [], [])
    assert len(measured.products) == 4 and {cell.kind for cell in measured.cells} == {"mlstm", "slstm", "attention"}
    assert [step.n_blocks for step in measured.steps] == [1, 3, 3]
    assert {"date", "commit", "command", "torch", "deepspeed"} <= set(measured.provenance)
    assert "tiny=true" in measured.provenance["command"]
    # The plan reads it: its own steps are within a factor, where each is a fit of two or three.
    found = fit(measured)
    assert "the host's time of written blocks" not in found.assumed
    assert all(0.2 < 1 + one.time_error < 5 for one in compared_steps(measured))

    calibrate(tmp_path, "output=cpu.json", "tiny=true", processes=2)
    both = read_calibration(tmp_path / "cpu.json")
    assert both.steps == measured.steps and both.provenance == measured.provenance
    assert [(point.operation, point.nodes, point.ranks) for point in both.collectives] == [
        ("all_reduce", 1, 2),
        ("all_gather", 1, 2),
    ]


def test_what_is_measured_of_a_gpu_fits_one_of_80_gb():
    """And each model is there with two depths, all of its blocks of one kind."""
    program, depths = full_program(), {}
    for steps in program.steps:
        (kind,) = set(steps.config.block_kinds())
        assert steps.block in (None, kind)
        for shape in steps.shapes:
            plan = make_plan(run_config(steps.config, shape), 1, "NVIDIA H100 80GB HBM3")
            assert plan.rank_bytes < 50 * 2**30
            depths.setdefault((steps.model, shape), []).append(steps.n_blocks)
    assert {len(found) for found in depths.values()} <= {1, 2}
    assert sum(len(found) == 2 for found in depths.values()) == 8
    kinds = {layer_kinds(steps.config)[0].name for steps in program.steps}
    assert kinds == {"mlstm", "preup_mlstm", "attention", "slstm"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is refused")
def test_a_cpu_is_refused_for_the_shapes_of_models(capsys, tmp_path):
    assert main(["calibrate", f"output={tmp_path}/cpu.json"]) == 2
    assert "tiny: this machine has no GPU, and what a CPU takes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output=/no/such/folder/x.json", "seconds=0"], "seconds: must be positive (0.0)"),
        (["output=no_such_folder/x.json"], "output: there is no folder no_such_folder; make it, or name another file"),
        (["output=s3://bucket/x.json"], "output: must be a folder of this machine, not a URL"),
        (["out=x.json"], "out: no such key (did you mean 'output'?)"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_measured(capsys, arguments, message):
    assert main(["calibrate", "tiny=true", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "measured" not in printed.err


def test_processes_need_the_file_of_one(capsys, monkeypatch, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["calibrate", "tiny=true", f"output={tmp_path}/none.json"]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    (tmp_path / "none.json").write_text(json.dumps({"format_version": 1}))
    assert main(["calibrate", "tiny=true", f"output={tmp_path}/none.json"]) == 2
    assert "holds no calibration" in capsys.readouterr().err
