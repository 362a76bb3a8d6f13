"""`inspect --sample` shows the sample that a run with the same settings reads."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from data_pipeline.__main__ import main
from data_pipeline.ordering.config import MixturePhaseConfig
from data_pipeline.ordering.mixture import MixtureConfig
from data_pipeline.reading.stream import SampleStream
from train.config import CorpusConfig, RunConfig, TrainingConfig
from train.data import open_stream

INDICES = (0, 17, 140)


def check_shown(shown: str, stream: SampleStream, index: int) -> None:
    origin, batch = stream.origin(index), stream.batch(index, 1)
    text = stream.corpus.tokenizer().decode(batch.tokens[0].tolist())
    head, source, *rest = shown.rstrip("\n").split("\n")
    assert head.startswith(f"sample {index} of the order {stream.fingerprint[:16]} (")
    assert source == f"source {origin.source}, epoch {origin.epoch}, sample {origin.sample} of it"
    assert rest == [
        *(f"  {file}: tokens {first} to {end - 1}" for file, first, end in origin.parts),
        f"documents start at positions {batch.document_start[0].nonzero().flatten().tolist()}",
        *(f"  | {line}" for line in text.split("\n")),
    ]


@pytest.mark.parametrize("weights", [None, {"RedPajamaC4": 3.0, "RedPajamaBook": 1.0}], ids=["pool", "weights"])
@pytest.mark.parametrize("window", [None, 2])
def test_the_sample_is_that_of_the_stream(corpus, capsys, window, weights):
    options = ["--sequence-length", "20", "--seed", "3"]
    options += [] if window is None else ["--window-shards", str(window)]
    for source, weight in (weights or {}).items():
        options += ["--weight", f"{source}={weight}"]
    stream = SampleStream(corpus, "train", 20, 3, MixtureConfig(weights), window_shards=window)
    other = SampleStream(corpus, "train", 20, 3, MixtureConfig(weights), window_shards=2 if window is None else None)
    for index in INDICES:
        assert main(["inspect", str(corpus.directory), "--sample", str(index), *options]) == 0
        check_shown(capsys.readouterr().out, stream, index)
        assert stream.origin(index) != other.origin(index)


ORDERS = {
    "as a whole": {},
    "windows": {"window_shards": 2},
    "another split": {"split": "validation", "window_shards": 1},
    "best fit": {"packing": "best_fit"},
    "lanes": {"carry_state": True, "temperature": 2.0},
    "mixture": {
        "weights": {"RedPajamaC4": 3.0, "RedPajamaBook": 1.0},
        "epoch_caps": {"RedPajamaBook": 2.0},
        # Sample 140 lies behind it.
        "phases": [MixturePhaseConfig(from_step=10, temperature=2.0)],
        "window_shards": 2,
    },
}


@pytest.mark.parametrize("settings", ORDERS.values(), ids=ORDERS)
def test_the_order_comes_from_the_folder_of_a_run(corpus, tmp_path, capsys, settings):
    settings = dict(settings)
    carry_state = settings.pop("carry_state", False)
    settings = {**settings, "packing_directory": str(tmp_path / "plans")} if "packing" in settings else settings
    reads = CorpusConfig(directory=str(corpus.directory), **settings)
    training = TrainingConfig(
        sequence_length=20,
        global_batch_size=8,
        micro_batch_size=8,
        total_steps=20,
        carry_state=carry_state,
        carry_windows=3,
    )
    config = RunConfig(name="run", seed=5, training=training, corpus=reads)
    # As train/run.py writes it.
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    stream = open_stream(config, corpus)
    for index in INDICES:
        assert main(["inspect", str(corpus.directory), "--sample", str(index), "--run", str(tmp_path)]) == 0
        check_shown(capsys.readouterr().out, stream, index)


def test_several_samples_are_shown_one_after_the_other(corpus, capsys):
    options = ["--sequence-length", "20", "--seed", "3"]
    stream = SampleStream(corpus, "train", 20, 3)
    assert main(["inspect", str(corpus.directory), "--samples", "17:3", *options]) == 0
    shown = capsys.readouterr().out.split("\n\nsample ")
    assert len(shown) == 3
    for number, text in enumerate(shown):
        check_shown(text if number == 0 else f"sample {text}", stream, 17 + number)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1"], "--seed: only --sample uses it; say which with --sample I"),
        (["--sample", "0", "--run", "nowhere"], "--run: nowhere/config.yaml: no such file; give the folder of a run"),
        (
            ["--sample", "0", "--run", "live", "--seed", "0", "--window-shards", "2"],
            "--seed, --window-shards: --run live says it already; leave out one of the two",
        ),
        (["--sample", "0", "--run", "live"], "the run reads no prepared corpus (corpus.directory is null)"),
        (["--sample", "0", "--window-shards", "0"], "window_shards: needs at least 1 shard"),
        (["--sample", "0", "--weight", "RedPajamaC4"], "--weight: needs SOURCE=W with a number W (RedPajamaC4)"),
        (["--sample", "0", "--weight", "RedPajamaX=1"], "weights.RedPajamaX: the corpus has no such source"),
        (["--samples", "5:0"], "--samples: must be at least one sample (5:0)"),
        (["--samples", "5:2", "--sample", "5"], "--samples: --sample is another way to say which"),
        (["--samples", "5:x"], "--samples: needs FIRST:COUNT with two whole numbers (5:x)"),
        (["--sample", "-1"], "--sample: must be at least 0 and below 2^62 (-1)"),
        (["--sample", str(10**20)], "--sample: must be at least 0 and below 2^62 (100000000000000000000)"),
    ],
)
def test_options_that_do_not_go_together_are_refused(corpus, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "config.yaml").write_text("seed: 0\ncorpus: {directory: null}\ntraining: {}\n")
    assert main(["inspect", str(corpus.directory), *options]) == 2
    assert message in capsys.readouterr().err
