"""Pipeline stages compute what one process computes: curves, held-out losses, monitors, checkpoints."""

import itertools
import json

import pytest

from tests.runs import ROOT, TINY_RUN, run_script
from tests.train.plain_runs import run_plainly

STEPS = 20
# Every kind of layer, the sLSTM with its convolution; a block for each of four stages. The head is tied, the hardest.
MODEL = [
    "model.n_blocks=5",
    "model.slstm_at=[1]",
    "model.attention_at=[3]",
    "+model.attention.n_heads=4",
    "+model.attention.n_kv_heads=2",
    "model.tie_embeddings=true",
]
RUN = [*TINY_RUN, *MODEL, f"training.total_steps={STEPS}"]
WATCHED = [
    "evaluation.interval=10",
    "logging.monitor_interval=10",
    "checkpoint.interval=10",
    "logging.samples.interval=20",
    "logging.samples.max_new_tokens=8",
    "logging.samples.temperature=0",
]
# 12, 12 and 8 of the 32 tokens.
CHUNKS = ["parallel.pipeline=2", "training.time_chunk=12"]
UNTIED = "model.tie_embeddings=false"
# What differs where sequence ranks measure the first tokens of a sequence, or is near zero, has no relative precision.
COMPARED = ("rms", "gradient_norm", "parameter_norm", "_max", "saturation")


class Curves:
    """Runs under one folder, and what they wrote."""

    def __init__(self, root, corpus):
        self.root, self.corpus = root, corpus

    def overrides(self, name, changes):
        return [f"name={name}", f"run_root={self.root}", f"corpus.directory={self.corpus}", *RUN, *WATCHED, *changes]

    def start(self, processes, runs):
        """Train all of {name: overrides}, one after the other."""
        arguments = [json.dumps([self.overrides(name, changes) for name, changes in runs.items()])]
        done = run_script(ROOT / "tests/train/parallel/several_runs.py", arguments, processes)
        assert done.returncode == 0, done.stdout + done.stderr

    def plainly(self, name, changes):
        assert run_plainly(self.overrides(name, ["parallel=zero0", *changes])) == 0

    def lines(self, name, kind):
        text = (self.root / name / "metrics.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]

    def assert_alike(self, name, expected, steps=STEPS, tolerance=1e-5):
        """The last `steps` steps of two runs, with the held-out losses and the monitors between them."""
        for kind, keys in {"train": ("loss", "grad_norm"), "evaluation": ("loss",)}.items():
            ours, theirs = ([line for line in self.lines(run, kind)] for run in (name, expected))
            theirs = [line for line in theirs if line["step"] > STEPS - steps]
            assert [line["step"] for line in ours] == [line["step"] for line in theirs]
            assert kind == "evaluation" or len(ours) == steps
            for key in keys:
                assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=tolerance)

    def assert_same_monitors(self, name, expected, compared=COMPARED):
        ours, theirs = (self.lines(run, "statistics") for run in (name, expected))
        assert len(ours) == len(theirs) == 2
        for mine, whole in zip(ours, theirs, strict=True):
            assert mine["values"].keys() == whole["values"].keys()
            names = [key for key in whole["values"] if key.endswith(compared)]
            assert len(names) > 40
            # As for sequence ranks: AdamW's steps at a high rate enlarge the rounding of small gradients.
            expected_values = {key: whole["values"][key] for key in names}
            assert {key: mine["values"][key] for key in names} == pytest.approx(expected_values, rel=1e-3, abs=1e-5)
        ours, theirs = (self.lines(run, "profiles") for run in (name, expected))
        for mine, whole in zip(ours, theirs, strict=True):
            assert mine["values"].keys() == whole["values"].keys()
            for key in whole["values"]:
                # Of all tokens: those of an mLSTM.
                if key.startswith("blocks.00.") and "norm" not in key:
                    assert mine["values"][key] == pytest.approx(whole["values"][key], rel=1e-3, abs=1e-5), key


@pytest.fixture(scope="module")
def curves(small_corpus, tmp_path_factory):
    """The runs of the default suite: "one" on PlainEngine, the others in stages, and branches of each other."""
    found = Curves(tmp_path_factory.mktemp("pipeline"), small_corpus)
    found.plainly("one", [])
    branch = f"resume_from={found.root}/p2@10"
    found.start(
        2,
        {
            "p2": ["parallel.pipeline=2"],
            "p2_again": ["parallel.pipeline=2", branch],
            "p2_chunks": [*CHUNKS, "parallel.activation_checkpointing=unit"],
            "p2_chunks_of_one": [*CHUNKS, f"resume_from={found.root}/one@10"],
        },
    )
    found.start(
        4,
        {
            "p4_of_p2": ["parallel.pipeline=4", branch],
            "p2_data2": ["parallel.pipeline=2"],
            "p2_sequence2": [
                "parallel.pipeline=2",
                "parallel.sequence=2",
                "parallel.activation_checkpointing=unit",
            ],
            "p4": ["parallel.pipeline=4", "parallel=zero0"],
        },
    )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["p2", "p2_data2", "p2_sequence2", "p2_chunks", "p4"])
def test_stages_give_the_curve_of_one_process(curves, name):
    curves.assert_alike(name, "one")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["p2", "p2_data2", "p4"])
def test_monitors_are_those_of_one_process(curves, name):
    curves.assert_same_monitors(name, "one")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["p2_sequence2", "p2_chunks"])
def test_monitors_of_parts_of_sequences_name_every_layer(curves, name):
    curves.assert_same_monitors(name, "one", ("rms", "gradient_norm", "parameter_norm"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["p2", "p2_sequence2", "p2_chunks", "p4"])
def test_stages_together_write_what_one_process_writes(curves, name):
    written, expected = ((curves.root / run / "samples.jsonl").read_text() for run in (name, "one"))
    assert written == expected


@pytest.mark.slow
def test_a_resumed_run_is_bitwise_that_which_never_stopped(curves):
    curves.assert_alike("p2_again", "p2", STEPS - 10, tolerance=0)


@pytest.mark.slow
def test_a_checkpoint_of_two_stages_goes_on_with_four(curves):
    curves.assert_alike("p4_of_p2", "one", STEPS - 10)


@pytest.mark.slow
def test_a_checkpoint_of_four_stages_goes_on_in_one_process(curves):
    curves.plainly("one_of_p4", [f"resume_from={curves.root}/p4@10"])
    curves.assert_alike("one_of_p4", "one", STEPS - 10)


@pytest.mark.slow
def test_a_checkpoint_of_stages_and_chunks_goes_on_in_one_process_and_back(curves):
    curves.plainly("one_of_chunks", [f"resume_from={curves.root}/p2_chunks@10"])
    curves.assert_alike("one_of_chunks", "one", STEPS - 10)
    curves.assert_alike("p2_chunks_of_one", "one", STEPS - 10)


@pytest.mark.slow
def test_the_plan_of_a_run_has_its_stages(curves):
    plan = json.loads((curves.root / "p4" / "plan.json").read_text())
    blocks = [range(stage["first_block"], stage["first_block"] + stage["blocks"]) for stage in plan["stages"]]
    assert len(blocks) == 4 and list(itertools.chain(*blocks)) == list(range(5))
    assert plan["bubble"] == pytest.approx(3 / 7) and plan["replicas"] == 1


@pytest.fixture(scope="module")
def more_curves(small_corpus, tmp_path_factory):
    """Under the marker layouts: every other pair, bf16, and all routes between checkpoints."""
    found = Curves(tmp_path_factory.mktemp("layouts"), small_corpus)
    found.plainly("one", [])
    found.plainly("one_untied", [UNTIED])
    stages = "parallel.pipeline=2"
    found.start(1, {"bf16": ["precision=bf16"], "bf16_zero0": ["precision=bf16", "parallel=zero0"]})
    found.start(
        2,
        {
            "p2": [stages, "parallel.activation_checkpointing=block"],
            "p2_untied": [stages, UNTIED],
            "p2_zero0": [stages, "parallel=zero0"],
            "p2_bf16": [stages, "precision=bf16"],
            "p2_zero0_bf16": [stages, "precision=bf16", "parallel=zero0"],
            "p2_one_pass": [stages, "training.micro_batch_size=8"],
            "p2_chunks_untied": [*CHUNKS, UNTIED, "parallel=zero0", "training.micro_batch_size=8"],
            "p2_chunks_bf16": [*CHUNKS, "precision=bf16"],
            "zero3": ["parallel=zero3"],
            "sequence2": ["parallel.sequence=2"],
        },
    )

    def of(parent, *changes):
        return [f"resume_from={found.root}/{parent}@10", *changes]

    found.start(
        2,
        {
            "zero3_of_p2": of("p2", "parallel=zero3"),
            "sequence2_of_p2": of("p2", "parallel.sequence=2"),
            "p2_of_zero3": of("zero3", stages),
            "p2_of_sequence2": of("sequence2", stages, "parallel=zero0"),
        },
    )
    found.start(
        4,
        {
            "p4": ["parallel.pipeline=4"],
            "p4_chunks": [*CHUNKS, "parallel.pipeline=4"],
            "p2_data2_chunks": [*CHUNKS, "parallel.activation_checkpointing=block"],
            "p4_untied": ["parallel.pipeline=4", UNTIED],
            "p2_data2_zero0": [stages, "parallel=zero0"],
            "p2_data2_bf16": [stages, "precision=bf16"],
            "p2_sequence2_zero0_bf16": [stages, "parallel.sequence=2", "precision=bf16", "parallel=zero0"],
            "p4_of_zero3": of("zero3", "parallel.pipeline=4"),
            "p2_data2_of_p2": of("p2", stages),
            "p2_sequence2_of_p2": of("p2", stages, "parallel.sequence=2"),
        },
    )
    found.start(2, {"p2_of_p4": of("p4", stages)})
    found.plainly("one_of_p2", of("p2"))
    return found


@pytest.mark.layouts
@pytest.mark.parametrize(
    "name", ["p2", "p2_zero0", "p2_one_pass", "p2_data2_zero0", "p2_data2_chunks", "p4", "p4_chunks"]
)
def test_further_layouts_give_the_curve_of_one_process(more_curves, name):
    more_curves.assert_alike(name, "one")


@pytest.mark.layouts
@pytest.mark.parametrize("name", ["p2_untied", "p2_chunks_untied", "p4_untied"])
def test_a_head_of_its_own_gives_the_curve_of_one_process(more_curves, name):
    more_curves.assert_alike(name, "one_untied")


@pytest.mark.layouts
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("p2_bf16", "bf16"),
        ("p2_chunks_bf16", "bf16"),
        ("p2_data2_bf16", "bf16"),
        ("p2_zero0_bf16", "bf16_zero0"),
        ("p2_sequence2_zero0_bf16", "bf16_zero0"),
    ],
)
def test_bf16_stays_near_one_process(more_curves, name, expected):
    """One process in bf16 is 4e-4 (losses) and 3e-3 (gradient norms) from fp32 here."""
    for key, tolerance in {"loss": 1e-3, "grad_norm": 1e-2}.items():
        ours, theirs = ([line[key] for line in more_curves.lines(run, "train")] for run in (name, expected))
        assert ours == pytest.approx(theirs, rel=tolerance)


@pytest.mark.layouts
@pytest.mark.parametrize(
    "name",
    [
        "zero3_of_p2",
        "sequence2_of_p2",
        "p2_of_zero3",
        "p2_of_sequence2",
        "p4_of_zero3",
        "p2_data2_of_p2",
        "p2_sequence2_of_p2",
        "p2_of_p4",
        "one_of_p2",
    ],
)
def test_checkpoints_go_on_under_any_layout(more_curves, name):
    more_curves.assert_alike(name, "one", STEPS - 10)


@pytest.mark.layouts
def test_compiled_blocks_take_chunks_through_stages(small_corpus, tmp_path):
    found = Curves(tmp_path, small_corpus)
    # The loop of the sLSTM is not compiled on a CPU.
    changes = [*CHUNKS, "model.slstm_at=[]", "model.slstm=null", "training.total_steps=4"]
    found.start(2, {f"compiled_{on}": [*changes, f"training.compile={on}"] for on in ("false", "true")})
    for key in ("loss", "grad_norm"):
        ours, theirs = ([line[key] for line in found.lines(f"compiled_{on}", "train")] for on in ("true", "false"))
        assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-5)
