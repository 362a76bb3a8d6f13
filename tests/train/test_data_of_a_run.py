"""What a run reads: mixtures with phases, packing, held-out loss by source, and text that is tokenized on the way."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conf import compose
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.tokenizing.config import TokenizerConfig
from tests.data_pipeline.small_corpora import LABELS, quietly, slimpajama_config, write_slimpajama
from tests.runs import PATIENCE, TINY_RUN, environment, reserved_port, run_train, train_command
from train.config import RunConfig
from train.data import validate_corpus
from train.evaluate import open_evaluation_corpora

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def slimpajama(tmp_path_factory):
    """Three sources in SlimPajama's layout, raw and prepared."""
    folder = tmp_path_factory.mktemp("slimpajama")
    write_slimpajama(folder / "raw")
    quietly(slimpajama_config(folder / "raw", folder / "corpus"))
    return folder


def lines_of(path, kind):
    return [
        line for line in map(json.loads, path.read_text().splitlines()) if kind in (line.get("kind"), line.get("event"))
    ]


def run(root, name, *overrides):
    return run_train([f"name={name}", f"run_root={root}", *TINY_RUN, "model.vocab_size=448", *overrides])


def test_the_documented_mixture_can_be_typed():
    blocks = re.findall(r"```sh.*?\n(.*?)```", (ROOT / "docs/guides/your_corpus.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "phases" in block)
    script = f"python() {{ printf '%s\\0' \"$@\"; }}\n{block}"
    typed = subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout
    overrides = [argument for argument in typed.split("\0") if "=" in argument]
    config = compose(RunConfig, "train", ["name=mixed", "corpus.directory=corpora/slimpajama", *overrides])
    assert len(config.corpus.weights) == 7 and config.corpus.epoch_caps == {"RedPajamaBook": 2}
    assert config.corpus.phases[0].from_step == 90000 and validate_corpus(config.corpus) == []


def test_a_held_out_set_of_another_tokenizer_is_refused(slimpajama, tmp_path):
    tokenizer = TokenizerConfig(vocab_size=390, sample_bytes=200_000)
    quietly(slimpajama_config(slimpajama / "raw", tmp_path / "other", tokenizer=tokenizer))
    directories = [
        f"corpus.directory={slimpajama / 'corpus'}",
        f"evaluation.sets.validation.directory={tmp_path}/other",
    ]
    config = compose(RunConfig, "train", ["name=other", *directories])
    with pytest.raises(
        ValueError, match=r"sets\.validation\.directory: .*/other was prepared with another tokenizer than"
    ):
        open_evaluation_corpora(config, Corpus.open(slimpajama / "corpus"))


@pytest.mark.slow
def test_mixed_sources_are_held_out_one_by_one(slimpajama, tmp_path):
    overrides = [
        f"corpus.directory={slimpajama / 'corpus'}",
        f"corpus.packing_directory={tmp_path / 'plans'}",
        "corpus.packing=best_fit",
        "+corpus.weights={RedPajamaC4: 3, RedPajamaBook: 1}",
        "corpus.workers=2",
        "evaluation=by_source",
        "evaluation.batch_size=4",
        "evaluation.sets.validation.max_tokens=null",
        "training.total_steps=6",
    ]
    phases = "corpus.phases=[{from_step: 3, temperature: 2.0}]"
    done = run(tmp_path, "mixed", *overrides, phases, "+corpus.epoch_caps={RedPajamaBook: 20}")
    assert done.returncode == 0, done.stderr
    assert "best fit:" in done.stderr and "RedPajamaGithub: " in done.stderr and " epochs" in done.stderr
    evaluations = {line["set"]: line for line in lines_of(tmp_path / "mixed" / "metrics.jsonl", "evaluation")}
    parts = [evaluations[f"validation/{label}"] for label in LABELS]
    assert evaluations.keys() == {"validation", *(f"validation/{label}" for label in LABELS)}
    assert evaluations["validation"]["tokens"] == sum(part["tokens"] for part in parts)
    mean = sum(part["loss"] * part["tokens"] for part in parts) / evaluations["validation"]["tokens"]
    assert evaluations["validation"]["loss"] == pytest.approx(mean)
    assert all(part["perplexity"] == pytest.approx(math.exp(part["loss"])) for part in parts)
    events = lines_of(tmp_path / "mixed" / "events.jsonl", "evaluation_set")
    assert {event["set"]: event["tokens"] for event in events} == {
        name: line["tokens"] for name, line in evaluations.items() if name != "validation"
    }
    assert len({event["fingerprint"] for event in events}) == 3

    caps = "+corpus.epoch_caps={RedPajamaBook: 1, RedPajamaC4: 0.1}"
    too_long = run(tmp_path, "capped", *overrides, caps, "training.total_steps=500")
    assert too_long.returncode == 2 and "corpus.epoch_caps: every source has reached its cap after" in too_long.stderr


@pytest.mark.slow
def test_another_corpus_under_the_same_folder_is_refused_with_the_difference(slimpajama, tmp_path):
    shutil.copytree(slimpajama / "corpus", tmp_path / "corpus")
    overrides = [f"corpus.directory={tmp_path / 'corpus'}", "checkpoint.interval=2"]
    assert run(tmp_path, "a", *overrides, "training.total_steps=4").returncode == 0
    shutil.rmtree(tmp_path / "corpus")
    write_slimpajama(tmp_path / "other", seed=8)
    quietly(slimpajama_config(tmp_path / "other", tmp_path / "corpus"))
    refused = run(tmp_path, "a", *overrides, "training.total_steps=6")
    assert refused.returncode == 2
    assert "holds other data than before (corpus: " in refused.stderr and "tokenizer: " in refused.stderr
    assert "corpus.allow_changed_data=" in refused.stderr
    reason = "corpus.allow_changed_data=the corpus was prepared again"
    allowed = run(tmp_path, "a", *overrides, "training.total_steps=6", reason)
    assert allowed.returncode == 0, allowed.stderr
    (event,) = lines_of(tmp_path / "a" / "events.jsonl", "data_changed")
    assert event["reason"] == "the corpus was prepared again"
    assert {"corpus", "tokenizer", "order"} <= event["changes"].keys()


@pytest.mark.slow
def test_text_that_is_tokenized_on_the_way_resumes_exactly(slimpajama, tmp_path):
    overrides = [
        "corpus.directory=null",
        "+data@corpus.live.data=slimpajama",
        "+tokenizer@corpus.live.tokenizer=file",
        f"corpus.live.data.path={slimpajama / 'raw'}",
        f"corpus.live.tokenizer.path={slimpajama / 'corpus' / 'tokenizer'}",
        f"evaluation.sets.validation.directory={slimpajama / 'corpus'}",
        "training.total_steps=8",
        "checkpoint.interval=4",
    ]
    whole = run(tmp_path, "whole", *overrides)
    assert whole.returncode == 0, whole.stderr
    assert "tokenized while they are read" in whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    config = tmp_path / "half" / "config.yaml"
    config.write_text(config.read_text().replace("name: whole", "name: half"))
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000008")
    again = run(tmp_path, "half", *overrides)
    assert again.returncode == 0, again.stderr

    def losses(name):
        lines = lines_of(tmp_path / name / "metrics.jsonl", "train")
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]

    assert losses("half") == losses("whole") and len(losses("whole")) == 8
    refused = run(
        tmp_path, "other", *overrides, "corpus.temperature=2", "evaluation=validation", "corpus.max_epochs=0.5"
    )
    assert refused.returncode == 2
    assert "corpus.max_epochs: text that is tokenized while it is read is read in whole passes (0.5)" in refused.stderr
    assert "corpus.temperature: text that is tokenized while it is read is taken as it comes (2.0)" in refused.stderr


@pytest.mark.slow
def test_a_step_that_damage_leaves_without_targets_ends_the_run(slimpajama, tmp_path):
    shutil.copytree(slimpajama / "corpus", tmp_path / "corpus")
    shutil.rmtree(tmp_path / "corpus" / "shards" / "train")
    done = run(
        tmp_path, "lost", f"corpus.directory={tmp_path / 'corpus'}", "corpus.on_corrupt=skip", "training.total_steps=4"
    )
    assert done.returncode == 1
    assert "step 0 has no target: damaged shards hold all of its samples, number 0 and the 7 that follow" in done.stderr
    events = lines_of(tmp_path / "lost" / "events.jsonl", "damage")
    assert events and all("the shard is missing" in event["problem"] and event["step"] == 0 for event in events)


@pytest.mark.slow
def test_ranks_that_read_different_corpora_under_one_name_are_refused(slimpajama, tmp_path):
    write_slimpajama(tmp_path / "other", seed=8)
    quietly(slimpajama_config(tmp_path / "other", tmp_path / "1" / "corpus"))
    shutil.copytree(slimpajama / "corpus", tmp_path / "0" / "corpus")
    overrides = ["name=apart", f"run_root={tmp_path}", *TINY_RUN, "model.vocab_size=448", "training.total_steps=2"]
    with reserved_port() as port:
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [
            subprocess.Popen(
                train_command([*overrides, "corpus.directory=corpus"]),
                env={**environment(), **world, "RANK": rank, "LOCAL_RANK": rank},
                cwd=tmp_path / rank,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]
        messages = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "ranks [1] read other data than rank 0 at corpus (they differ in corpus, " in messages[0]


@pytest.mark.slow
def test_a_remote_corpus_larger_than_its_cache_is_read_in_windows_and_resumes(slimpajama, tmp_path):
    quietly(slimpajama_config(slimpajama / "raw", tmp_path / "store", shard_bytes=1000))
    overrides = [
        f"corpus.directory=file://{tmp_path / 'store'}",
        f"corpus.cache_directory={tmp_path / 'cache'}",
        f"corpus.cache_gib={40_000 / 2**30}",
        "checkpoint.interval=3",
    ]
    full = run(tmp_path, "full", *overrides, "training.total_steps=1")
    assert full.returncode == 0, full.stderr
    warning = (
        r"cache      WARNING: .*: in a full permutation \d+% of the samples each fetch a block,\n.* GiB a step; set "
    )
    assert re.search(warning + r"corpus\.window_shards", full.stderr)
    windows = [*overrides, "training.total_steps=6", "corpus.window_shards=2"]
    whole = run(tmp_path, "whole", *windows)
    assert whole.returncode == 0, whole.stderr
    assert "Windows of 2 shards hold up to" in whole.stderr and "WARNING" not in whole.stderr
    losses = [line["loss"] for line in lines_of(tmp_path / "whole" / "metrics.jsonl", "train")]
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-00000006")
    changed = run(tmp_path, "whole", *windows, "corpus.window_shards=3")
    assert changed.returncode == 2 and "corpus.window_shards: " in changed.stderr
    again = run(tmp_path, "whole", *windows)
    assert again.returncode == 0 and "Resuming 'whole' from step-00000003" in again.stderr
    assert [line["loss"] for line in lines_of(tmp_path / "whole" / "metrics.jsonl", "train")] == losses
