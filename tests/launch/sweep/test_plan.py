"""From a sweep's configuration to its manifest: rows, numbers, and what is refused, all at once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from conf import CONF_DIR, ConfigError, compose
from launch.__main__ import main
from launch.scaling.flops import run_flops
from launch.sweep.grid import check_warmups, expand
from launch.sweep.manifest import Row, SweepFolder, read_manifest, write_manifest
from launch.sweep.plan import manifest_of, plan_sweep, read_sweep
from launch.sweep.prediction import predictor
from launch.sweep.rows import configs_of
from tests.documented import quoted, table
from tests.launch.sweep.sweeps import sweep_of
from train.config import PrecisionConfig, RunConfig
from train.estimate.calibration import SHIPPED, read_calibration
from train.estimate.machine import Machine
from train.plan import make_plan
from train.stored_configuration import as_yaml

TWO_SIZES = "sweep.sizes=[{d_model: 32, n_blocks: 1}, {d_model: 48, n_blocks: 2}]"
REUSE = "sweep.reuse={decay: 0.2, warmup: 0.1}"


def grid_of(root, corpus, *settings):
    config, further = read_sweep(sweep_of(root, corpus, *settings))
    return config, expand(config, further)


@pytest.fixture(scope="module")
def planned_once(small_corpus, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sweeps")
    assert plan_sweep(sweep_of(root, small_corpus)) == 0
    return root / "tiny"


@pytest.fixture
def planned(planned_once, tmp_path) -> SweepFolder:
    """The folder of a sweep of four runs, which a sweep's folder may be moved as."""
    shutil.copytree(planned_once, tmp_path / "tiny")
    return SweepFolder(tmp_path / "tiny")


def test_rows_are_every_family_size_context_seed_and_length(tmp_path):
    settings = [TWO_SIZES, "sweep.contexts=[32,64]", "sweep.seeds=[0,1]", "sweep.tokens_per_parameter=[1]"]
    _, grid = grid_of(tmp_path, "x", *settings)
    assert grid.problems == [] and len(grid.rows) == 2 * 2 * 2 * 2 * 3
    assert "xlstm-38.1k-t32-s1-2e9" in grid.configs and "llama-97k-t64-s0-1tpp" in grid.configs
    assert len({row.name for row in grid.rows}) == len(grid.rows)
    # What was validated is what is started.
    for row in grid.rows[::47]:
        assert compose(RunConfig, "train", [*row.overrides, f"name={row.name}"]) == grid.configs[row.name]
    for row in grid.rows:
        config = grid.configs[row.name]
        assert (row.steps, row.tokens) == (config.total_steps, config.total_steps * config.tokens_per_step)
        assert (
            row.flops == pytest.approx(run_flops(config.model, row.context, row.tokens)) and row.flops == row.own_flops
        )
        wanted = row.budget or run_flops(config.model, row.context, row.parameters)
        assert abs(row.flops - wanted) <= 0.5 * row.flops / row.steps * 1.001


def test_rules_give_the_batch_and_the_rate(tmp_path):
    settings = [
        "sweep.batch_tokens={value: 1000, by: parameters, at: 38148, exponent: 0.5}",
        "sweep.families.llama.learning_rate={value: 0.5}",
        "processes_per_node=3",
        "sweep.micro_batch_tokens=100",
        "sweep.budgets=[2.0e10]",
        TWO_SIZES,
    ]
    _, grid = grid_of(tmp_path, "x", *settings)
    assert grid.problems == []
    small, large, llama = (grid.configs[f"{name}-2e10"] for name in ("xlstm-38.1k", "xlstm-97.7k", "llama-38k"))
    # 31.25 samples, and 50.01, in threes.
    assert (small.training.global_batch_size, large.training.global_batch_size) == (30, 51)
    # Ten and seventeen of a process in passes of at most three samples.
    assert (small.training.micro_batch_size, large.training.micro_batch_size) == (2, 1)
    assert llama.optimizer.learning_rate == 0.5
    assert small.optimizer.learning_rate == pytest.approx(0.01 * (38148 / 5e4) ** -0.333, rel=1e-3)


def test_one_long_run_and_branches_take_the_place_of_many_runs(tmp_path):
    _, grid = grid_of(tmp_path, "x", REUSE, "sweep.budgets=[1.0e9, 2.0e9, 4.0e9]")
    assert grid.problems == []
    trunk, *branches = grid.rows[:4]
    assert (trunk.role, trunk.name) == ("trunk", "xlstm-38.1k-trunk") and {row.role for row in branches} == {"branch"}
    schedule = grid.configs[trunk.name].schedule
    assert (schedule.kind, schedule.warmup) == ("constant", 2)
    leaves = [row.parent_step for row in branches]
    assert grid.configs[trunk.name].checkpoint.keep_at == leaves and trunk.steps == leaves[-1]
    for row in branches:
        assert row.parent == trunk.name
        schedule = grid.configs[row.name].schedule
        assert (schedule.kind, schedule.warmup, schedule.decay) == ("wsd", 2, round(0.2 * row.steps))
        assert row.parent_step == row.steps - schedule.decay
        assert row.own_flops == pytest.approx(row.flops * schedule.decay / row.steps)
    whole = [row.steps for row in branches]
    assert trunk.steps + sum(row.steps - row.parent_step for row in branches) < sum(whole)
    # A trunk with one branch would be no saving.
    _, grid = grid_of(tmp_path, "x", REUSE, "sweep.budgets=[2.0e9]")
    assert {row.role for row in grid.rows} == {"run"} and grid.configs[grid.rows[0].name].schedule.kind == "wsd"


def test_larger_models_get_more_nodes_and_limits_leave_runs_out(tmp_path):
    settings = [TWO_SIZES, "sweep.larger=[{parameters: 9e4, nodes: 2}]", "sweep.most_tokens_per_parameter=0.2"]
    _, grid = grid_of(tmp_path, "x", *settings)
    assert grid.problems == []
    assert {row.name: row.processes for row in grid.rows} == {
        "xlstm-38.1k-1e9": 1, "xlstm-97.7k-1e9": 2, "xlstm-97.7k-2e9": 2,
        "llama-38k-1e9": 1, "llama-97k-1e9": 2, "llama-97k-2e9": 2,
    }  # fmt: skip
    assert [one.name for one in grid.left_out] == ["xlstm-38.1k-2e9", "llama-38k-2e9"]
    assert [(one.key, round(one.tokens_per_parameter, 3)) for one in grid.left_out] == [
        ("most_tokens_per_parameter", 0.308), ("most_tokens_per_parameter", 0.327),
    ]  # fmt: skip


def test_all_that_is_wrong_with_a_sweep_is_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as told:
        read_sweep(
            sweep_of(
                tmp_path,
                "x",
                "sweep.name=a/b",
                "sweep.budgets=[1e9,1e9]",
                "sweep.sizes=[{d_model: 32}, {parameters: 1e5, preset: tiny}]",
                "sweep.learning_rate.by=mood",
                "sweep.families.llama.overrides=['seed=5']",
                "launch.continuation=chain",
                "training.total_steps=5",
                "sweep.seeds=[]",
            )
        )
    text = str(told.value)
    for problem in (
        "sweep.name: becomes the name of a folder; use letters, digits, _, - and . ('a/b')",
        "sweep.budgets: 1e+09 is there twice",
        "sweep.sizes[0]: give preset, or parameters, or d_model and n_blocks",
        "sweep.sizes[1]: give preset, or parameters, or d_model and n_blocks",
        "sweep.learning_rate.by: no such choice ('mood'); choose one of parameters, non_embedding, d_model, flops",
        "sweep.families.llama.overrides: seed=5 is made by the sweep; change sweep.seeds",
        "launch.continuation: chain is for single runs",
        "the command: training.total_steps=5 is made by the sweep; change sweep.budgets or sweep.tokens_per_parameter",
        "sweep.seeds: empty, so there are no runs",
    ):
        assert problem in text
    assert len(told.value.problems) == 9
    with pytest.raises(ConfigError) as told:
        read_sweep(sweep_of(tmp_path, "x", "sweep.budgts=[1]", "training.total_tokens=5"))
    assert (
        "sweep.budgts: no such key (did you mean 'sweep.budgets'?)" in str(told.value) and len(told.value.problems) == 2
    )


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        (
            ["sweep.families.llama.model=lama", "training.micro_bach=3", "launch.time=soon"],
            [
                "launch.time: no time as Slurm writes it (soon)",
                "llama: model=lama: conf/model/ has no such file",
                "xlstm, llama: training.micro_bach: no such key (did you mean 'training.micro_batch_size'?)",
            ],
        ),
        (
            ["sweep.batch_tokens.value=3072", "optimizer.eps=-1", "sweep.budgets=[1.0e9, 4.0e9]", "schedule.warmup=1"],
            [
                "xlstm-38.1k-1e9: 5,878 tokens are 2 steps of 3,072, fewer than sweep.least_steps=4; use a",
                "all rows: optimizer.eps",
                "schedule.warmup: 1 of 8 steps are a greater share than sweep.longest_warmup=0.1",
            ],
        ),
        (
            ["sweep.sizes=[{d_model: 32, n_blocks: 1}, {d_model: 32, n_blocks: 1}, {parameters: 1e3}]"],
            [
                "xlstm-38.1k-1e9, xlstm-38.1k-2e9, llama-38k-1e9 and 1 more: two runs of the sweep have this name",
                "xlstm, size 3: the model nearest to 1,000 parameters has",
            ],
        ),
        (["sweep.budgets=[1.0e9, 1.01e9]"], ["xlstm-38.1k-1.01e9: is the same run as xlstm-38.1k-1e9; leave one"]),
        (["corpus.directory=nowhere"], ["all rows: nowhere: no such folder"]),
        (
            [REUSE, "sweep.learning_rate.by=flops", "sweep.base=['schedule=wsd']", "schedule.decay=3"],
            [
                "sweep.learning_rate.by: flops differ between the branches of one run, whose rate and",
                "sweep.base: schedule=wsd does not go with sweep.reuse, which makes the schedule",
                "the command: schedule.decay=3 does not go with sweep.reuse",
            ],
        ),
        (["sweep.most_tokens_per_parameter=0.01"], ["sweep: its limits leave out every run"]),
    ],
)
def test_rows_that_cannot_work_are_refused_by_name(small_corpus, tmp_path, capsys, settings, problems):
    assert main(["sweep", "plan", *sweep_of(tmp_path, small_corpus, *settings)]) == 2
    printed = capsys.readouterr()
    for problem in problems:
        assert problem in printed.err, printed.err
    assert "Traceback" not in printed.err and not (tmp_path / "tiny").exists()


def test_a_manifest_is_written_once_and_not_changed_by_accident(planned, small_corpus, tmp_path, capsys):
    arguments = ["sweep", "plan", *sweep_of(tmp_path, small_corpus)]
    before = planned.manifest.read_bytes()
    assert main(arguments) == 0 and "is planned like this already" in capsys.readouterr().err
    other = [*arguments, "sweep.budgets=[1.0e9, 4.0e9]"]
    assert main(other) == 2
    error = capsys.readouterr().err
    assert "was planned otherwise; give this sweep another sweep.name=..." in error
    assert "sweep.budgets: [1000000000.0, 2000000000.0] -> [1000000000.0, 4000000000.0]" in error
    assert "rows gone: xlstm-38.1k-2e9, llama-38k-2e9" in error and "rows new: xlstm-38.1k-4e9" in error
    assert planned.manifest.read_bytes() == before
    # A row that has begun must stay.
    begun = planned.run("xlstm-38.1k-2e9")
    begun.mkdir(parents=True)
    row = read_manifest(planned).row(begun.name)
    (begun / "config.yaml").write_text(as_yaml(configs_of(planned, [row])[row.name]))
    assert main([*other, "--replace"]) == 2
    assert "rows that have begun would be lost or be other runs: xlstm-38.1k-2e9" in capsys.readouterr().err
    more = [*arguments, "sweep.budgets=[1.0e9, 2.0e9, 4.0e9]"]
    assert main([*more, "--replace", "--dry-run"]) == 0 and planned.manifest.read_bytes() == before
    assert main([*more, "--replace"]) == 0 and len(read_manifest(planned).rows) == 6


def test_a_manifest_that_is_anothers_damaged_or_of_a_later_version_is_refused(planned, tmp_path, capsys):
    stored = json.loads(planned.manifest.read_text())
    row = stored["rows"][0]
    for content, problem in (
        ("{", "is no JSON"),
        (json.dumps({"format_version": 1, "rows": []}), "is no manifest of a sweep"),
        (json.dumps(stored | {"format_version": 2}), "a later version wrote it: upgrade xlstm-pretrain"),
        (json.dumps(stored | {"rows": [row | {"steps": "many"}]}), "rows[0].steps cannot be 'many'"),
        (json.dumps(stored | {"rows": [row, row]}), f"two rows are named {row['name']}"),
        (json.dumps(stored | {"rows": [row | {"role": "leaf"}]}), "rows[0].role is none of run, trunk, branch"),
        (json.dumps(stored | {"rows": [row | {"steps": 7}]}), "is not what was planned: its checksum is another"),
    ):
        planned.manifest.write_text(content)
        assert main(["sweep", "status", str(planned.path)]) == 2
        assert problem in capsys.readouterr().err
    for command in (["submit", "--local"], ["collect"]):
        assert main(["sweep", *command, str(planned.path)]) == 2
        assert problem in capsys.readouterr().err
    for path, problem in ((tmp_path, "is no folder of a sweep"), (planned.manifest, "is a file; name the folder")):
        assert main(["sweep", "status", str(path)]) == 2
        assert problem in capsys.readouterr().err


def test_a_sweep_whose_files_have_changed_since_is_refused_with_what_differs(planned, capsys):
    """As if conf/sweep/demo.yaml had had other values then."""
    manifest = read_manifest(planned)
    older = json.loads(json.dumps(manifest.configuration))
    older["sweep"]["learning_rate"]["value"] = 0.5
    rows = [
        dataclasses.replace(row, overrides=[*row.overrides[:-1], "optimizer.learning_rate=0.5"])
        for row in manifest.rows
    ]
    write_manifest(dataclasses.replace(manifest, configuration=older, rows=rows), planned)
    for where in (["--local"], []):
        assert main(["sweep", "submit", str(planned.path), *where]) == 2
        error = capsys.readouterr().err
        assert "its configuration has changed since it was planned" in error and "--as-planned" in error
        assert "sweep.learning_rate.value: 0.5 -> 0.01" in error
        assert "rows with other settings: xlstm-38.1k-1e9, xlstm-38.1k-2e9, llama-38k-1e9 and 1 more" in error
    assert not planned.runs.exists()
    # As if the file was not there any more.
    write_manifest(dataclasses.replace(manifest, arguments=["sweep=gone", *manifest.arguments[1:]]), planned)
    assert main(["sweep", "submit", str(planned.path), "--local"]) == 2
    assert "sweep=gone: conf/sweep/ has no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--minutes", "5"], "--minutes: needs --local"),
        (["--local", "--at-once", "2", "--test-only"], "--at-once: is for a cluster, without --local"),
        (["--local", "--processes", "7"], "all rows: training.global_batch_size: 8 samples do not divide into passes"),
        ([], "squeue is not on this machine; log in where jobs are submitted"),
    ],
)
def test_a_submission_that_cannot_work_is_refused(planned, monkeypatch, capsys, options, problem):
    monkeypatch.setenv("PATH", "nowhere")
    assert main(["sweep", "submit", str(planned.path), *options]) == 2
    assert problem in capsys.readouterr().err and not planned.runs.exists()


def test_scripts_of_arrays_are_shown_without_slurm(planned, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "nowhere")
    assert main(["sweep", "submit", str(planned.path), "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n") and "SLURM_ARRAY_TASK_ID + 1" in printed.out
    assert "--array=0-3: 4 runs; nothing was written" in printed.err and not planned.submissions.exists()


def test_predictions_stand_in_the_manifest_where_something_predicts(tmp_path):
    config, grid = grid_of(tmp_path, "x", "processes_per_node=2", REUSE)
    arguments = sweep_of(tmp_path, "x")
    assert {row.hours for row in manifest_of(config, arguments, grid).rows} == {None}
    manifest = manifest_of(config, arguments, grid, lambda run, row: run.total_steps / row.processes)
    trunk, branch, _ = manifest.rows[:3]
    assert (trunk.hours, trunk.gpu_hours) == (trunk.steps / 2, trunk.steps)
    # Of a branch its own steps.
    assert branch.hours == pytest.approx((branch.steps - branch.parent_step) / 2)


def test_hours_are_those_of_the_plan_of_each_run():
    arguments = ["sweep=isoflop_small", "corpus.directory=x", "gpus_per_node=1"]
    config, further = read_sweep(arguments)
    grid = expand(config, further)
    rows = manifest_of(config, arguments, grid, predictor("h200")).rows
    machine = Machine(read_calibration(SHIPPED / "h200.json"), 1, 1)
    plan = make_plan(grid.configs[rows[0].name], 1, machine=machine)
    assert rows[0].hours == pytest.approx(plan.predicted_seconds / 3600) and all(0 < row.hours < 10 for row in rows)
    in_fp32 = dataclasses.replace(grid.configs[rows[0].name], precision=PrecisionConfig("fp32"))
    assert predictor("h200")(in_fp32, rows[0]) is None


def test_every_key_of_a_row_is_documented():
    documented = [key for row in table("scaling_laws.md", "key") for key in quoted(row[0])]
    assert documented == [field.name for field in dataclasses.fields(Row)]


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "sweep").glob("*.yaml")))
def test_every_sweep_that_comes_with_the_project_works(name):
    config, further = read_sweep([f"sweep={name}", "corpus.directory=x"])
    grid = expand(config, further)
    assert grid.problems == [] and check_warmups(grid, config.sweep.longest_warmup) == []
    assert len(config.sweep.families) > 1 and len(grid.rows) >= 12
