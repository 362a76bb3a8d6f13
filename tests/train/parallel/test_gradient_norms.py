"""Under every layout, the loss and the gradient norm of every parameter at every step are those of one process.

On real processes over gloo, in fp32, with documents that begin anywhere and targets that are masked.

Two things would make rounding grow until nothing else is seen; one process that only sums in another order
(`reference_chunk_size` 8 for 16) then is as far from itself as two sequence ranks are from it:

- AdamW divides a gradient by its own size. With a high learning rate and its usual epsilon of 1e-8 it makes whole steps
  of gradients that are nothing but rounding. At a rate of 1e-2 gradients of gate biases part by 1e-2 in the hybrid, by
  0.5 in the NeurIPS blocks.
- A head norm divides the output of the cell by its size. With its usual epsilon of 1e-6 a token of which the cell puts
  out little enlarges the rounding of all gradients before it, by ten at some steps.

So the runs have a lower rate and larger epsilons.
"""

import json
import random
from dataclasses import dataclass

import pytest

from data_pipeline import SampleStream, open_corpus
from data_pipeline.reading.batch import MASKED
from tests.runs import ROOT, TINY_RUN, prepared_corpus, run_script
from tests.train.parallel.gradient_norms import GradientNorms, read_norms
from tests.train.plain_runs import run_plainly

STEPS, TOKENS, SAMPLES = 20, 48, 8
RUN = [
    *TINY_RUN,
    "model.d_model=48",
    # As many as 2, 3 and 4 sequence ranks can share.
    "model.slstm.n_heads=12",
    "optimizer.learning_rate=1e-3",
    "optimizer.eps=1e-4",
    f"training.sequence_length={TOKENS}",
    f"training.global_batch_size={SAMPLES}",
    f"training.total_steps={STEPS}",
    "corpus.on_corrupt=skip",
]
# A block for each of four stages. The sLSTM has a convolution, and so has the mLSTM of the NeurIPS blocks.
HYBRID = [
    "model.n_blocks=5",
    "model.slstm_at=[1]",
    "model.attention_at=[3]",
    "+model.attention.n_heads=12",
    # Which all sequence ranks share.
    "+model.attention.n_kv_heads=1",
    "model.tie_embeddings=true",
    "model.mlstm.head_norm_eps=1e-4",
]
NEURIPS = [
    "model=tiny_neurips",
    "model.n_blocks=4",
    "model.slstm_at=[1]",
    "model.ffn_dim=64",
    "model.preup_mlstm.n_heads=2",
    "model.preup_mlstm.reference_chunk_size=16",
    "model.preup_mlstm.head_norm_eps=1e-4",
]
MODELS = {"hybrid": HYBRID, "neurips": NEURIPS}
PACKINGS = ("concatenate", "best_fit")
STAGES = {2: "parallel.pipeline=2", 4: "parallel.pipeline=4"}
SLICES = {n: f"parallel.sequence={n}" for n in (2, 3, 4)}
# 20, 20 and 8 of the 48 tokens.
UNEVEN_CHUNKS = "training.time_chunk=20"
# Of so many processes; what is left of them are replicas. ZeRO-1 where nothing else is said.
LAYOUTS = {
    2: {
        "ZeRO-0": ["parallel=zero0"],
        "ZeRO-1": [],
        "ZeRO-2": ["parallel=zero2"],
        "ZeRO-3": ["parallel=zero3"],
        "sequence 2": [SLICES[2]],
        "sequence 2 x ZeRO-3": [SLICES[2], "parallel=zero3"],
        "pipeline 2": [STAGES[2]],
        "pipeline 2 x chunks": [STAGES[2], UNEVEN_CHUNKS],
    },
    3: {"sequence 3": [SLICES[3]]},
    4: {
        "sequence 4": [SLICES[4]],
        "sequence 2 x data 2 x ZeRO-3": [SLICES[2], "parallel=zero3"],
        "pipeline 4": [STAGES[4]],
        "pipeline 2 x data 2": [STAGES[2]],
        "pipeline 2 x sequence 2": [STAGES[2], SLICES[2]],
        "pipeline 4 x chunks": [STAGES[4], UNEVEN_CHUNKS],
        "pipeline 2 x data 2 x chunks": [STAGES[2], UNEVEN_CHUNKS],
    },
}


@dataclass(frozen=True)
class Tolerance:
    """Of losses and gradient norms, relative to those of one process.

    A parameter's gradient may be far smaller than the terms whose sum it is, such as that of a gate's bias over all
    tokens, and so near their rounding. Below the share `small` of the norm of all gradients a difference is relative to
    the share.
    """

    loss: float
    norm: float
    small: float


FP32 = {
    "hybrid": Tolerance(loss=1e-5, norm=1e-5, small=1e-3),
    # The input gates' biases open all gates alike, which the normaliser takes back: their gradients are what is left of
    # terms that cancel.
    "neurips": Tolerance(loss=1e-5, norm=1e-5, small=1e-2),
}
# A number in bf16 is rounded to 4e-3 of itself.
BF16 = Tolerance(loss=1e-3, norm=1e-1, small=1e-2)


class Runs:
    """Runs under one folder on one corpus."""

    def __init__(self, root, corpus):
        self.root, self.corpus = root, corpus

    def overrides(self, name, model, changes):
        given = [f"name={name}", f"run_root={self.root}", f"corpus.directory={self.corpus}", *RUN, *MODELS[model]]
        if model == "neurips":
            given = [key for key in given if not key.startswith(("model=tiny", "model.mlstm.")) or key in NEURIPS]
        return [*given, *changes]

    def one_process(self, name, model, changes):
        assert run_plainly(self.overrides(name, model, ["parallel=zero0", *changes]), [GradientNorms()]) == 0

    def start(self, processes, model, runs, changes):
        """Train all of {name: overrides}, one after the other."""
        given = [self.overrides(name, model, [*layout, *changes]) for name, layout in runs.items()]
        script = ROOT / "tests/train/parallel/several_runs.py"
        done = run_script(script, [json.dumps(given)], processes)
        assert done.returncode == 0, done.stdout + done.stderr

    def losses(self, name):
        lines = map(json.loads, (self.root / name / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "train"]

    def differences(self, name, expected, small):
        """Of losses, and of gradient norms by parameter: the largest of any step, relative."""
        of_losses = zip(self.losses(name), self.losses(expected), strict=True)
        apart = {"loss": max(abs(ours - theirs) / theirs for ours, theirs in of_losses)}
        of_steps = list(zip(read_norms(self.root / name), read_norms(self.root / expected), strict=True))
        assert len(of_steps) == STEPS
        for ours, theirs in of_steps:
            assert ours.keys() == theirs.keys()
            whole = sum(norm**2 for norm in theirs.values()) ** 0.5
            for parameter, norm in theirs.items():
                difference = abs(ours[parameter] - norm) / max(norm, small * whole)
                apart[parameter] = max(apart.get(parameter, 0.0), difference)
        assert len(apart) > 50
        return apart


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of about half a sample, and some of several samples. One shard is damaged: its samples are masked."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 6))) for _ in range(200)]
    texts = [" ".join(generator.choices(words, k=generator.choice([7, 8, 9, 9, 10, 11, 30]))) for _ in range(800)]
    folder = prepared_corpus(tmp_path_factory.mktemp("short_documents"), texts, "shard_bytes=8000")
    # Packing reads every shard, once.
    SampleStream(open_corpus(folder), "train", TOKENS, 0, packing="best_fit")
    shard = sorted((folder / "shards" / "train").iterdir())[3]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    return folder


@pytest.fixture
def runs(corpus, tmp_path):
    return Runs(tmp_path, corpus)


@pytest.mark.slow
@pytest.mark.parametrize("packing", PACKINGS)
def test_documents_cross_the_borders_of_slices_and_targets_are_masked(corpus, packing):
    stream = SampleStream(open_corpus(corpus), "train", TOKENS, 0, packing=packing, on_corrupt="skip")
    batch = stream.batch(0, STEPS * SAMPLES)
    masked = batch.targets == MASKED
    for ranks in (2, 3, 4):
        *_, last = batch.document_start.chunk(ranks, 1)
        assert last[:, 1:].any()
        for border in range(TOKENS // ranks, TOKENS, TOKENS // ranks):
            crossed = ~(batch.document_start | masked)[:, border]
            assert crossed.float().mean() > 0.4
    assert masked.float().mean() > 0.05 and masked.any(1).float().mean() < 0.9


@pytest.mark.slow
@pytest.mark.long
def test_sequence_ranks_with_zero_3_and_stages_have_every_gradient_norm(runs):
    layouts = {name: LAYOUTS[2][name] for name in ("sequence 2 x ZeRO-3", "pipeline 2", "pipeline 2 x chunks")}
    check_in_fp32(runs, 2, layouts, "hybrid", "corpus.packing=best_fit")


@pytest.mark.slow
@pytest.mark.layouts
@pytest.mark.parametrize("stages", STAGES)
def test_two_micro_batches_in_chunks_through_stages_have_every_gradient_norm(runs, stages):
    layouts = {
        f"{chunks} chunks": [STAGES[stages], f"training.time_chunk={TOKENS // chunks}", "training.micro_batch_size=4"]
        for chunks in (1, 2, 4)
    }
    check_in_fp32(runs, stages, layouts, "hybrid", "corpus.packing=best_fit")


@pytest.mark.slow
@pytest.mark.layouts
@pytest.mark.parametrize("processes", [2, 4])
def test_bf16_stays_near_one_process(runs, processes):
    changes = ["corpus.packing=best_fit", "precision=bf16"]
    runs.start(1, "hybrid", {"one": []}, changes)
    runs.start(processes, "hybrid", LAYOUTS[processes], changes)
    for layout in LAYOUTS[processes]:
        check(runs, layout, BF16)


@pytest.mark.slow
@pytest.mark.layouts
@pytest.mark.parametrize(
    ("model", "packing"), [("hybrid", "concatenate"), ("hybrid", "best_fit"), ("neurips", "best_fit")]
)
@pytest.mark.parametrize("processes", LAYOUTS)
def test_every_layout_has_every_gradient_norm(runs, processes, model, packing):
    check_in_fp32(runs, processes, LAYOUTS[processes], model, f"corpus.packing={packing}")


def check_in_fp32(runs, processes, layouts, model, packing):
    runs.one_process("one", model, [packing])
    runs.start(processes, model, layouts, [packing])
    for layout in layouts:
        check(runs, layout, FP32[model])


def check(runs, layout, tolerance):
    apart = runs.differences(layout, "one", tolerance.small)
    assert apart.pop("loss") <= tolerance.loss, layout
    assert {name: largest for name, largest in apart.items() if largest > tolerance.norm} == {}, layout
