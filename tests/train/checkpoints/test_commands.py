"""`python -m train.checkpoint verify|describe|consolidate|prune` on checkpoints of real runs."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.loading import load
from tests.privileges import permissions_hold
from tests.runs import ROOT, TINY_RUN, run_train
from tests.train.checkpoints.test_damaged import DAMAGES, sign
from tests.train.plain_runs import copied_run, run_plainly, saved_run
from train.checkpoint import main
from train.checkpoints.layout import MARKER, keep
from train.run_directory import RunLock


@pytest.fixture(scope="module")
def base(small_corpus, tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("commands"), small_corpus, "schedule=constant")


@pytest.fixture
def run(base, tmp_path):
    """The folder of a run of two checkpoints."""
    return copied_run(base, tmp_path)[0]


@pytest.fixture(scope="module")
def two_ranks(small_corpus, tmp_path_factory):
    """The folder of a run of two ranks, which both hold a part of the weights."""
    root = tmp_path_factory.mktemp("ranks")
    settings = ["name=run", f"run_root={root}", f"corpus.directory={small_corpus}"]
    done = run_train([*settings, *TINY_RUN, "parallel=zero2", "parallel.sequence=2", "training.total_steps=2"], 2)
    assert done.returncode == 0, done.stderr
    return root / "run"


def steps(run):
    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").iterdir())]


def test_whole_checkpoints_are_told_by_their_files_and_size(run, capsys):
    assert main(["verify", f"{run}@1", str(run)]) == 0
    out = capsys.readouterr().out.splitlines()
    folders = [run / "checkpoints" / f"step-{step:08d}" for step in (1, 2)]
    assert [line.partition(": whole, 6 files of ")[0] for line in out] == list(map(str, folders))
    shutil.copytree(folders[0], run / "checkpoints" / "step-00000003", ignore=shutil.ignore_patterns(MARKER))
    assert main(["verify", str(run), "--all"]) == 0
    out = capsys.readouterr().out
    assert out.count(": whole") == 2 and "step-00000003: incomplete, no checkpoint" in out
    for folder in folders:
        (folder / MARKER).unlink()
    assert main(["verify", str(run), "--all"]) == 2
    assert "has no complete checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_checkpoint_is_named(run, damage, capsys):
    make, words = DAMAGES[damage]
    make(run / "checkpoints" / "step-00000002")
    with permissions_hold():
        assert main(["verify", str(run), "--all"]) == 1
    printed = capsys.readouterr()
    assert words in printed.err and "Traceback" not in printed.err
    assert "step-00000001: whole" in printed.out and "step-00000002: damaged" in printed.out


@pytest.mark.parametrize("part", ["weights", "exp_avg_sq"])
def test_numbers_that_are_not_finite_are_counted(part, run, capsys):
    folder = run / "checkpoints" / "step-00000002"
    path = folder / part / "weights-00000.safetensors"
    with torch.no_grad():
        tensors = load_file(path)
        name = max(tensors, key=lambda name: tensors[name].numel())
        tensors[name][5] = torch.nan
        tensors[name][-1] = -torch.inf
        save_file(tensors, path, {"format_version": "1", "shapes": _shapes(path)})
    sign(folder)
    assert main(["verify", str(run)]) == 1
    assert f"{path}: 2 numbers of {name} are not finite" in capsys.readouterr().err


def _shapes(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()["shapes"]


def test_a_checkpoint_is_described(two_ranks, capsys):
    assert main(["describe", str(two_ranks), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    folder = two_ranks / "checkpoints" / "step-00000002"
    assert found["checkpoint"] == str(folder) and found["run"] == str(two_ranks)
    assert found["layout"] == {"world_size": 2, "zero_stage": 2, "pipeline": 1, "sequence": 2, "data": 1}
    assert (found["step"], found["applied_steps"], found["tokens"]) == (2, 2, 2 * 8 * 32)
    assert (found["dtype"], found["format_version"], found["kept"]) == ("float32", 1, False)
    parameters = sum(parameter.numel() for parameter in load(folder).parameters())
    assert found["parameters"] == parameters
    assert found["data"]["next_sample"] == 16 and found["data"]["sequence_length"] == 32
    marker = json.loads((folder / MARKER).read_text())
    assert found["files"] == {name: entry["bytes"] for name, entry in sorted(marker["files"].items())}
    assert found["attempt"] == marker["attempt"]
    sizes = found["bytes"]
    assert sizes["total"] == sum(found["files"].values()) == sizes["weights"] + sizes["optimizer"] + sizes["rest"]
    assert 4 * parameters < sizes["weights"] < 4.5 * parameters + 20_000 and sizes["optimizer"] > 8 * parameters

    keep(folder)
    assert main(["describe", str(folder)]) == 0
    lines = capsys.readouterr().out
    assert f"parameters  {parameters:,} in float32" in lines and ", kept for good" in lines
    assert "written by  2 processes: ZeRO stage 2, pipeline 1, sequence 2, data 1" in lines
    (folder / "kept.json").unlink()


def test_what_an_earlier_version_did_not_write_is_not_known(tmp_path, capsys):
    fixture = ROOT / "tests" / "fixtures" / "0.2.0" / "runs" / "mixed"
    newest = max((fixture / "checkpoints").iterdir())
    shutil.copytree(newest, tmp_path / newest.name)
    assert main(["describe", str(tmp_path / newest.name), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"]["pipeline"] is None and found["layout"]["data"] is None and found["attempt"] is None
    assert main(["describe", str(tmp_path / newest.name)]) == 0
    assert "pipeline not known" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["marker: a list", "state: a list", "weights: a pipe"])
def test_what_cannot_be_described_is_named(damage, run, capsys):
    make, words = DAMAGES[damage]
    make(run / "checkpoints" / "step-00000002")
    assert main(["describe", str(run)]) == 2
    assert words in capsys.readouterr().err


def test_weights_of_two_ranks_become_whole_ones(two_ranks, tmp_path, capsys):
    expected = dict(load(two_ranks).named_parameters())
    assert len(list((two_ranks / "checkpoints" / "step-00000002" / "weights").glob("*.safetensors"))) == 2
    assert main(["consolidate", str(two_ranks), "--output", str(tmp_path / "whole"), "--file-gib", "0"]) == 0
    assert "in float32, in model.safetensors" in capsys.readouterr().out
    found = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert dict(load(tmp_path / "whole").named_parameters()).keys() == expected.keys()
    assert (tmp_path / "whole" / "tokenizer").is_dir()
    # The 60,000 parameters in four files or more.
    arguments = ["consolidate", f"{two_ranks}@2", "--output", str(tmp_path / "halves"), "--dtype", "bfloat16"]
    assert main([*arguments, "--file-gib", str(30_000 / 2**30)]) == 0
    halves = load(tmp_path / "halves", dtype=torch.bfloat16)
    assert all(torch.equal(p, expected[name].bfloat16()) for name, p in halves.named_parameters())
    assert len(list((tmp_path / "halves").glob("model-*.safetensors"))) >= 4


def test_a_run_begins_with_consolidated_weights(run, base, small_corpus, capsys):
    output = run.parent / "whole"
    assert main(["consolidate", f"{run}@1", "--output", str(output)]) == 0
    _, overrides = base
    more = [f"run_root={run.parent}", "name=tuned", f"initialise_from={output}", "training.total_steps=1"]
    assert run_plainly([*overrides, *more]) == 0
    assert f"Weights of {output}" in capsys.readouterr().err


def test_what_cannot_be_consolidated_leaves_nothing(run, tmp_path, capsys):
    output = tmp_path / "whole"
    weights = run / "checkpoints" / "step-00000002" / "weights" / "weights-00000.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["consolidate", str(run), "--output", str(output)]) == 2
    assert f"{weights} was altered" in capsys.readouterr().err
    assert main(["consolidate", f"{run}@1", "--output", str(run)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["consolidate", f"{run}@1", "--output", "s3://bucket/whole"]) == 2
    assert "--output: must be a folder of this machine" in capsys.readouterr().err
    for wrong in ("-1", "many", "nan"):
        with pytest.raises(SystemExit):
            main(["consolidate", f"{run}@1", "--output", str(output), "--file-gib", wrong])
    assert not output.exists() and not output.with_name("whole.partial").exists()


@pytest.fixture(scope="module")
def long_base(small_corpus, tmp_path_factory):
    """A run of six checkpoints; the decay of its schedule began behind the second."""
    root = tmp_path_factory.mktemp("prune")
    overrides = [f"run_root={root}", f"corpus.directory={small_corpus}", *TINY_RUN, "name=run", "parallel=zero0"]
    overrides += ["schedule=wsd", "schedule.warmup=1", "schedule.decay=4", "training.total_steps=6"]
    overrides += ["checkpoint.interval=1", "checkpoint.keep_last=6"]
    assert run_plainly(overrides) == 0
    return root / "run", overrides


@pytest.fixture
def long_run(long_base, tmp_path):
    return copied_run(long_base, tmp_path)[0]


def test_what_goes_is_shown_first_and_what_must_stay_stays(long_run, capsys):
    before = steps(long_run)
    assert before == [1, 2, 3, 4, 5, 6]
    keep(long_run / "checkpoints" / "step-00000001")
    arguments = ["prune", str(long_run), "--keep-last", "1", "--keep-every", "4"]
    assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    folders = [long_run / "checkpoints" / f"step-{step:08d}" for step in (3, 5)]
    assert shown == [f"{folder} would be deleted" for folder in folders] and steps(long_run) == before
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [f"{folder} is deleted" for folder in folders]
    # Kept by hand, before the decay, a multiple of four, the newest.
    assert steps(long_run) == [1, 2, 4, 6]
    # By the run's own settings nothing goes.
    assert main(["prune", str(long_run)]) == 0
    assert "has no checkpoint to delete" in capsys.readouterr().out


def set_callbacks(folder, **callbacks):
    state = json.loads((folder / "state.json").read_text())
    state["callbacks"] |= callbacks
    (folder / "state.json").write_text(json.dumps(state))
    sign(folder)


def test_the_best_and_what_the_run_may_go_back_to_stay(long_run):
    bad = {"bad_steps": [{"index": 4, "first_sample": 0, "samples": 8}], "loss": [], "grad_norm": [], "rollbacks": 0}
    set_callbacks(
        long_run / "checkpoints" / "step-00000006",
        Checkpointing={"best": [3, 1.5], "before_decay": []},
        BadSteps=bad,
    )
    assert main(["prune", str(long_run), "--keep-last", "1"]) == 0
    assert steps(long_run) == [3, 4, 6]


def test_a_damaged_newest_one_does_not_count_and_is_left(long_run, capsys):
    (long_run / "checkpoints" / "step-00000006" / "state.json").write_text("{}")
    assert main(["prune", str(long_run), "--keep-last", "2"]) == 0
    assert "step-00000006 is damaged and left as it is: " in capsys.readouterr().err
    assert steps(long_run) == [2, 4, 5, 6]
    for step in (2, 4, 5):
        (long_run / "checkpoints" / f"step-{step:08d}" / "state.json").unlink()
    assert main(["prune", str(long_run), "--keep-last", "1"]) == 2
    error = capsys.readouterr().err
    assert "has no checkpoint that is whole, so nothing may be deleted" in error and "state.json is missing" in error
    assert steps(long_run) == [2, 4, 5, 6]


def test_a_run_that_is_under_way_prunes_itself(long_run, capsys):
    lock = RunLock(long_run / "run.lock")
    try:
        assert main(["prune", str(long_run), "--keep-last", "1"]) == 2
        error = capsys.readouterr().err
        assert "is in use by process " in error and "prune when it has ended" in error
    finally:
        lock.release()
    assert len(steps(long_run)) == 6
    (long_run / "config.yaml").unlink()
    shutil.rmtree(long_run / "configurations")
    assert main(["prune", str(long_run)]) == 2
    assert "--keep-last: " in capsys.readouterr().err
    assert main(["prune", str(long_run), "--keep-last", "3"]) == 0
    assert steps(long_run) == [2, 4, 5, 6]


def test_a_state_that_does_not_say_what_stays_lets_nothing_go(long_run, capsys):
    set_callbacks(long_run / "checkpoints" / "step-00000006", Checkpointing={"best": 7})
    assert main(["prune", str(long_run), "--keep-last", "1"]) == 2
    assert "its state does not say which checkpoints must stay (TypeError: " in capsys.readouterr().err
    assert len(steps(long_run)) == 6
