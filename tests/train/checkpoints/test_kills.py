"""A supervisor kills ranks at random moments, again and again: no sample is lost or repeated, whatever the layout."""

import json
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from model.weights import WeightsReader
from tests.runs import ROOT, fork_server, run_script
from train.callbacks.metrics_file import read_metrics
from train.run_directory import read_events

LOGGED = ROOT / "tests" / "train" / "checkpoints" / "logged_train.py"
# (processes, settings).
LAYOUTS = [
    (1, "parallel=zero0"),
    (1, "parallel=zero1"),
    (2, "parallel=zero0"),
    (2, "parallel=zero1"),
    (2, "parallel=zero2"),
    (2, "parallel=zero3"),
    (2, "parallel.sequence=2"),
    (2, "parallel.pipeline=2"),
    (4, "parallel=zero2"),
    (4, "parallel=zero3 parallel.sequence=2"),
    (4, "parallel.pipeline=2 parallel.sequence=2"),
]


class Supervised:
    """A run that is started and killed under layouts that a generator chooses."""

    def __init__(self, overrides, folder, steps, generator):
        self.folder, self.run_directory = folder, folder / "killed"
        self.rows = folder / "rows"
        self.rows.mkdir()
        self.go_on = folder / "go on"
        self._overrides = ["name=killed", *overrides, f"training.total_steps={steps}"]
        self._steps, self._generator = steps, generator
        self.attempts, self.killed = 0, 0

    def start(self, layout):
        """The run as `layout` has it, up to its end."""
        processes, settings = layout
        self.attempts += 1
        arguments = [self.attempts, self._steps - 1, self.go_on, self.rows]
        return run_script(LOGGED, [*map(str, arguments), *self._overrides, *settings.split()], processes=processes)

    def start_and_kill(self, layout):
        """Kill one rank, or all, at a random moment: while it starts, or in a step, or while it saves."""
        done, generator = self._done_steps(), self._generator
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(self.start, layout)
            if generator.random() < 0.7:
                # Behind some steps, so that the run gets on; what it is busy with then is chance.
                steps = min(done + generator.randint(1, 12), self._steps - 1)
                while self._done_steps() < steps:
                    assert not run.done(), run.result().stderr
                    time.sleep(0.002)
            time.sleep(generator.uniform(0, 0.3))
            while not (ranks := psutil.Process(fork_server().pid).children()):
                assert not run.done(), run.result().stderr
                time.sleep(0.002)
            chosen = ranks if generator.random() < 0.5 else [generator.choice(ranks)]
            for rank in chosen:
                rank.kill()
            ended = run.result()
        assert ended.returncode != 0
        self.killed += 1

    def _done_steps(self):
        file = self.run_directory / "metrics.jsonl"
        return max((line["step"] for line in read_metrics(self.run_directory)), default=0) if file.exists() else 0

    def rows_of_steps(self):
        """step -> the rows of its global batch, each whole, by the last start that trained it."""
        last, parts = {}, {}
        for path in sorted(self.rows.iterdir()):
            attempt = int(path.name.split("-")[0])
            for text in path.read_text().splitlines(keepends=True):
                if not text.endswith("\n"):
                    continue
                line = json.loads(text)
                step = line["step"]
                if last.setdefault(step, attempt) != attempt:
                    last[step], parts[step] = attempt, {}
                data, number, sequence = line["place"]
                parts.setdefault(step, {})[data, number, sequence] = line["tokens"]
        return {step: sorted(_joined(of_step)) for step, of_step in parts.items()}


def _joined(parts):
    """Rows of slices, which sequence ranks have of the same rows."""
    batches = {}
    for (data, number, _), tokens in sorted(parts.items()):
        rows = batches.setdefault((data, number), [[] for _ in tokens])
        for row, slice_of_row in zip(rows, tokens, strict=True):
            row += slice_of_row
    return [tuple(row) for rows in batches.values() for row in rows]


@pytest.fixture
def overrides(tiny_run):
    # A rate at which roundings of other layouts do not grow.
    return [*tiny_run[1:], "checkpoint.interval=5", "optimizer.learning_rate=1e-3", "schedule=constant"]


def check(supervised, overrides, folder, steps, kills, is_bitwise):
    """Everything that an uninterrupted run would have left is there."""
    whole = Supervised(overrides, folder, steps, None)
    whole.go_on.touch()
    whole._overrides = ["name=whole", *overrides, f"training.total_steps={steps}"]
    done = whole.start(LAYOUTS[3])
    assert done.returncode == 0, done.stderr
    expected, found = whole.rows_of_steps(), supervised.rows_of_steps()
    assert supervised.killed == kills and list(expected) == list(range(steps))
    assert found.keys() == expected.keys()
    assert all(found[step] == expected[step] for step in expected), "samples were lost or repeated"
    lines = [read_metrics(run) for run in (folder / "whole", supervised.run_directory)]
    one, other = ([(x["step"], x["loss"], x["grad_norm"]) for x in of if x["kind"] == "train"] for of in lines)
    assert [step for step, _, _ in other] == list(range(1, steps + 1))
    if is_bitwise:
        assert one == other
    assert max(abs(a[1] - b[1]) for a, b in zip(one, other, strict=True)) < 1e-3
    for part in ("weights", "exp_avg", "exp_avg_sq") if is_bitwise else ():
        readers = [
            WeightsReader(run / "checkpoints" / f"step-{steps:08d}" / part)
            for run in (folder / "whole", supervised.run_directory)
        ]
        for name, shape in readers[0].shapes.items():
            one, other = (reader.read_range(name, 0, math.prod(shape)) for reader in readers)
            assert torch.equal(one, other), (part, name)
    # Every start but the first that took a step says how the one before it ended, or a rank did so itself.
    events = read_events(supervised.run_directory)
    starts = [event["attempt"] for event in events if event["event"] in ("start", "resume")]
    explained = {event["attempt"] for event in events if event["event"] == "error"}
    assert set(starts[:-1]) <= explained


def run_and_kill(overrides, tmp_path, steps, kills, layouts):
    # Generated at run time, so that every run of the suite tries other moments; printed when the test fails.
    seed = random.Random().randint(0, 2**32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    (tmp_path / "supervised").mkdir()
    supervised = Supervised(overrides, tmp_path / "supervised", steps, generator)
    supervised._overrides.append(f"run_root={tmp_path / 'supervised'}")
    for _ in range(kills):
        supervised.start_and_kill(generator.choice(layouts))
    supervised.go_on.touch()
    done = supervised.start(generator.choice(layouts))
    assert done.returncode == 0, done.stderr
    return supervised


@pytest.mark.slow
@pytest.mark.layouts
@pytest.mark.parametrize("kills", [30])
def test_kills_at_one_layout_leave_no_trace(kills, overrides, tmp_path):
    steps = 12 * kills
    supervised = run_and_kill(overrides, tmp_path, steps, kills, [LAYOUTS[3]])
    check(supervised, overrides, tmp_path, steps, kills, is_bitwise=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "layouts"), [(3, LAYOUTS[:8]), pytest.param(60, LAYOUTS, marks=pytest.mark.layouts)], ids=["3", "60"]
)
def test_kills_under_changing_layouts_lose_and_repeat_no_sample(kills, layouts, overrides, tmp_path):
    steps = 12 * kills
    supervised = run_and_kill(overrides, tmp_path, steps, kills, layouts)
    check(supervised, overrides, tmp_path, steps, kills, is_bitwise=False)
