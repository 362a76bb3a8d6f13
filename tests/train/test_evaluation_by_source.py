"""The loss of a set is that of its split, also where each source of it is scored on a part only."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
import torch
from torch.nn import functional

from conf import compose
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.reading.stream import WindowStream
from data_pipeline.tokenizing.config import TokenizerConfig
from model.initialisation import initialise
from tests.data_pipeline.small_corpora import quietly, slimpajama_config
from tests.runs import TINY_RUN
from tests.train.plain_engine import PlainEngine
from train.config import RunConfig
from train.evaluate import evaluate
from train.ngram_baselines import write_baselines
from train.parallel.mesh import join_mesh
from train.plan import make_plan

LENGTH = 32


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A corpus whose held-out text is one fifth of source b, of other words than source a."""
    folder = tmp_path_factory.mktemp("uneven")
    for split in ("train", "validation"):
        (folder / "raw" / split).mkdir(parents=True)
        texts = {"a": "game lo tri sta " * 40, "b": "12 = self.value of the " * 10}
        lines = [json.dumps({"text": text, "meta": {"redpajama_set_name": label}}) for label, text in texts.items()] * 6
        (folder / "raw" / split / "x.jsonl").write_text("\n".join(lines))
    quietly(slimpajama_config(folder / "raw", folder / "corpus", tokenizer=TokenizerConfig(vocab_size=310)))
    return folder / "corpus"


def configured(corpus, tmp_path, *overrides) -> RunConfig:
    return compose(
        RunConfig,
        "train",
        [
            "name=run",
            f"run_root={tmp_path}",
            f"corpus.directory={corpus}",
            *TINY_RUN,
            f"training.sequence_length={LENGTH}",
            "evaluation=by_source",
            "training.total_steps=1",
            "model.vocab_size=448",
            *overrides,
        ],
    )


def direct_losses(engine, corpus, source, windows):
    """Loss of each scored token of the first `windows` windows of a source, by PyTorch's own cross entropy."""
    stream = WindowStream(corpus, "validation", LENGTH, source)
    batch = stream.batch(0, windows or stream.windows)
    logits = engine.model(batch.tokens, document_start=batch.document_start)
    logits = getattr(logits, "logits", logits)
    losses = functional.cross_entropy(logits.flatten(0, 1).double(), batch.targets.flatten(), reduction="none")
    return losses[batch.targets.flatten() >= 0]


@pytest.mark.parametrize("max_tokens", [None, 2 * LENGTH])
def test_sources_count_in_the_set_as_much_as_they_have_in_the_split(max_tokens, uneven, tmp_path):
    limit = "null" if max_tokens is None else max_tokens
    config = configured(uneven, tmp_path, f"evaluation.sets.validation.max_tokens={limit}")
    corpus = Corpus.open(uneven)
    mesh = join_mesh(timedelta(seconds=60))
    try:
        engine = PlainEngine(config, make_plan(config, 1), mesh)
        initialise(engine.model, seed=0)
        # Sources must differ for their weights to matter.
        with torch.no_grad():
            dict(engine.model.named_parameters())["lm_head.weight"][:] *= torch.linspace(0, 30, 448)[:, None]
        results = evaluate(engine, config, {"validation": corpus})
        with torch.no_grad():
            parts = {s: direct_losses(engine, corpus, s, max_tokens and max_tokens // LENGTH) for s in ("a", "b")}
    finally:
        mesh.close()
    sizes = {source: corpus.tokens("validation", source) - 1 for source in parts}
    expected = sum(sizes[s] * parts[s].mean().item() for s in parts) / sum(sizes.values())
    assert results["validation"].loss == pytest.approx(expected, rel=1e-5)
    assert results["validation"].tokens == sum(map(len, parts.values()))
    for source, losses in parts.items():
        assert results[f"validation/{source}"].loss == pytest.approx(losses.mean().item(), rel=1e-5)
    equal = sum(losses.mean().item() for losses in parts.values()) / 2
    assert abs(equal - expected) > 1e-2 * expected


def test_counting_stands_beside_it_with_the_same_weights(uneven, tmp_path):
    """The n-gram baselines of the set are the mean over its sources, each weighted by its tokens in the split."""
    limit = f"evaluation.sets.validation.max_tokens={2 * LENGTH}"
    whole = write_baselines(configured(uneven, tmp_path, limit), tmp_path / "whole.json")
    corpus, expected = Corpus.open(uneven), dict.fromkeys(("unigram", "bigram"), 0.0)
    for source in ("a", "b"):
        one = configured(
            uneven,
            tmp_path,
            limit,
            "evaluation.sets.validation.by_source=false",
            f"evaluation.sets.validation.source={source}",
        )
        part = write_baselines(one, tmp_path / f"{source}.json")
        for name in expected:
            expected[name] += part[name]["loss"] * (corpus.tokens("validation", source) - 1)
    total = corpus.tokens("validation") - 2
    assert {name: whole[name]["loss"] for name in expected} == pytest.approx(
        {name: loss / total for name, loss in expected.items()}, rel=1e-9
    )
