"""On GPUs as on CPUs: a rank that stands still, fails, dies or is out of memory is named, in seconds. Two GPUs."""

import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.runs import ROOT, TINY_RUN, environment, run_script
from tests.train.watch.troubled_train import BEGINNING
from train.run_directory import read_events
from train.watch.ends import End

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
TROUBLED = ROOT / "tests" / "train" / "watch" / "troubled_train.py"
SECONDS = 6
# Until the others have noticed, at the interval of the watchdog's looks.
NOTICED = 3
TROUBLES = ("stop_when_seen", "sleep", "raise", "kill", "take_all_memory")
# Blocks that nothing has to be compiled for.
QUICK = [
    "training.compile=false",
    "training.kernel_preflight=false",
    "model.mlstm.backend=reference",
    "model.slstm.backend=reference",
]


class Troubled:
    """A run of two ranks of which the second got into trouble."""

    def __init__(self, kind, folder, corpus):
        settings = [f"run_root={folder}", f"corpus.directory={corpus}", *TINY_RUN, *QUICK, f"name={kind}"]
        more = ["training.total_steps=20", f"watchdog.seconds={SECONDS}"]
        self.done = run_script(TROUBLED, ["1", kind, "3", *settings, *more], processes=2, timeout=140)
        self.ended = time.time()
        self.folder = folder / kind

    def failure(self):
        """The one event that says why the run failed."""
        assert self.done.returncode == 1, self.done.stderr
        (event,) = [event for event in read_events(self.folder) if event["event"] == "error"]
        assert event["rank"] == 1, event
        return event

    def end(self, rank):
        return End.from_json(json.loads((self.folder / "logs" / f"rank-{rank:05d}.end.json").read_text()))

    def log(self, rank):
        return (self.folder / "logs" / f"rank-{rank:05d}.log").read_text()

    @property
    def began(self):
        return float((self.folder / BEGINNING).read_text())


@pytest.fixture(scope="module")
def runs(small_corpus, tmp_path_factory):
    """All of them at once: each is little work for a GPU, and seconds of imports."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(TROUBLES)) as pool:
        # Child processes of tests see no GPU otherwise.
        patch.setattr("tests.runs.environment", lambda: {**environment(), "CUDA_VISIBLE_DEVICES": "0,1"})
        return dict(zip(TROUBLES, pool.map(lambda kind: Troubled(kind, folder, small_corpus), TROUBLES), strict=True))


@pytest.mark.parametrize(("kind", "frame"), [("stop_when_seen", "in _stop_when_seen"), ("sleep", "in _sleep")])
def test_a_rank_that_hangs_is_named_in_time_with_phase_and_stack(runs, kind, frame):
    run = runs[kind]
    event = run.failure()
    assert event["kind"] == "hang" and "'data' of step 3" in event["message"] and frame in event["stack"]
    assert event["ended"] - run.began < SECONDS + NOTICED
    assert run.ended - event["ended"] < 60
    assert run.done.stderr.count("the run ends. Where every rank was") == 1 and event["message"] in run.done.stderr
    assert run.end(0).because_of == 1


def test_what_nccl_was_doing_is_kept_and_told(runs):
    hung, stopped = runs["sleep"], runs["stop_when_seen"]
    for rank in (0, 1):
        (dump,) = hung.folder.glob(f"logs/nccl-*/rank-{rank:05d}")
        found = pickle.loads(dump.read_bytes())
        assert found["entries"] and all(entry["frames"] for entry in found["entries"])
    assert "did not, the last there is #" in hung.log(0), hung.log(0)
    assert "rank 0 entered #" in hung.log(0) and "nccl:" in hung.log(0)
    assert "of rank 1 nothing is known" in stopped.log(0), stopped.log(0)


def test_a_rank_that_raises_is_named_in_seconds(runs):
    run = runs["raise"]
    event = run.failure()
    assert event["kind"] == "error" and "of no class that is expected" in event["message"]
    assert "in _raise" in event["stack"] and event["position"] == "'data' of step 3"
    assert event["ended"] - run.began < 10 and run.ended - run.began < 60
    assert run.end(0).because_of == 1


def test_a_rank_that_dies_is_named_in_seconds(runs):
    run = runs["kill"]
    event = run.failure()
    assert event["kind"] == "gone" and "is gone without a word" in event["message"]
    assert event["ended"] - run.began < 10 and run.ended - run.began < 60
    assert not (run.folder / "logs" / "rank-00001.end.json").exists()


def test_a_rank_whose_gpu_is_out_of_memory_is_named_in_seconds(runs):
    run = runs["take_all_memory"]
    event = run.failure()
    assert event["kind"] == "error" and "the GPU's memory is used up" in event["message"]
    assert "The same command resumes from the last checkpoint" in event["message"]
    assert event["ended"] - run.began < 10 and run.ended - run.began < 60
    assert run.end(0).because_of == 1
