"""The suite `length`: its perplexities are those of one pass over whole texts, in memory that does not grow."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from data_pipeline.corpus.corpus import open_corpus
from model.locate import Located
from model.state import named_tensors
from model.weights import save_model
from tests.model.conftest import CONFIGS, model_in_play
from tests.runs import ROOT, prepared_corpus, run_script
from train.config import RunConfig
from train.evaluate.command import main
from train.evaluate.suites.base import Subject
from train.evaluate.suites.length import (
    LengthSettings,
    LengthSuite,
    contexts_of,
    losses_between,
    position_borders,
)
from train.evaluate.suites.long_texts import find_long_texts
from train.evaluate.suites.results import read_results

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of which every tenth document is held out; documents of some tokens and of some thousands."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 2000 if number % 2 else 20)) for number in range(40)]
    return prepared_corpus(tmp_path_factory.mktemp("corpus"), texts)


class LocalMesh:
    """What a suite asks of a mesh of one process."""

    rank, is_main, device = 0, True, torch.device("cpu")


def subject_of(name: str, dtype=torch.float64) -> Subject:
    config = dataclasses.replace(CONFIGS[name], vocab_size=320)
    model = model_in_play(config, dtype).eval()
    return Subject(model, Located(ROOT, None), RunConfig(name="x"), LocalMesh(), False)


@pytest.mark.parametrize("name", ["hybrid", "neurips_mlstm_and_slstm", "attention"])
def test_losses_of_pieces_are_those_of_whole_texts(corpus, name):
    subject, opened = subject_of(name), open_corpus(corpus)
    texts = find_long_texts(opened, "train", None, "documents", 301, 2)
    borders = [0, 16, 100, 300]
    pieces = losses_between(subject, texts, borders, piece=37)
    expected = np.zeros(3)
    for text in texts:
        tokens = torch.from_numpy(text.read(0, 301))[None]
        with torch.no_grad():
            logits = subject.model(tokens[:, :-1]).logits[0]
        losses = -torch.log_softmax(logits.double(), -1).gather(-1, tokens[0, 1:, None])[:, 0]
        expected += [float(losses[low:high].sum()) for low, high in zip(borders[:-1], borders[1:], strict=True)]
    # fp32 at the loss, fp64 else.
    np.testing.assert_allclose(pieces, expected, rtol=1e-5)


@pytest.mark.parametrize(("name", "grows"), [("mlstm_and_slstm", False), ("neurips_mlstm", False), ("hybrid", True)])
def test_what_is_carried_grows_with_attention_alone(corpus, name, grows):
    subject = subject_of(name)
    sizes = []
    subject.model.register_forward_hook(
        lambda module, inputs, output: sizes.append(sum(x.nbytes for _, x in named_tensors(output.state)))
    )
    texts = find_long_texts(open_corpus(corpus), "train", None, "joined", 401, 2)
    losses_between(subject, texts, [0, 400], piece=50)
    assert len(sizes) == 8 and (len(set(sizes)) > 1) == grows


def test_texts_are_documents_from_their_beginning_or_all_text(corpus):
    opened = open_corpus(corpus)
    texts = find_long_texts(opened, "train", None, "documents", 500, 3)
    assert len(texts) == 3
    for text in texts:
        tokens, starts = np.empty(500, dtype=text.dtype), np.zeros(500, dtype=bool)
        text.sequence.read(text.start, tokens, starts)
        assert starts[0] and not starts[1:].any()
        assert text.start == 0 or tokens[0] == opened.eod_id
        np.testing.assert_array_equal(text.read(3, 7), tokens[3:10])
    joined = find_long_texts(opened, "train", None, "joined", 500, 3)
    assert [text.start for text in joined] == [0, 500, 1000]
    with pytest.raises(ValueError, match="a context of 999,999 needs 1,000,000 tokens, and the longest document"):
        find_long_texts(opened, "train", None, "documents", 1_000_000, 3)


def test_only_models_whose_memory_grows_are_bounded():
    settings = LengthSettings("length", contexts=[64, 128, 256], max_cached_tokens=128)
    assert contexts_of(CONFIGS["mlstm_and_slstm"], settings) == ([64, 128, 256], [])
    contexts, (note,) = contexts_of(CONFIGS["hybrid"], settings)
    assert contexts == [64, 128] and "read up to 128 of 256 tokens (suite.max_cached_tokens)" in note
    with pytest.raises(ValueError, match="suite.max_cached_tokens: this model keeps keys and values of every token"):
        contexts_of(CONFIGS["attention"], dataclasses.replace(settings, max_cached_tokens=32))
    assert position_borders([512, 1024]) == [0, 128, 256, 512, 1024] and position_borders([64]) == [0, 64]


def test_settings_that_make_no_sense_are_refused():
    wrong = LengthSettings("length", [4, 2], text="x", texts=0, batch_size=0, piece=0, max_cached_tokens=0)
    found = "\n".join(LengthSuite().validate(wrong))
    for key in ("contexts", "text: ", "texts", "batch_size", "piece", "max_cached_tokens"):
        assert f"suite.{key}" in found
    assert LengthSuite().validate(LengthSettings("length")) == []


@pytest.fixture
def command(corpus, tmp_path) -> list[str]:
    config = dataclasses.replace(CONFIGS["mlstm_and_slstm"], vocab_size=320)
    save_model(model_in_play(config, torch.float32), config, tmp_path / "weights")
    chosen = [str(tmp_path / "weights"), "suite=length", f"corpus.directory={corpus}", "suite.contexts=[256,1024]"]
    return [*chosen, "suite.split=train", "suite.texts=3", "suite.piece=300", "precision=fp32"]


def test_the_command_reads_long_texts(command, tmp_path, capsys):
    assert main([*command, "--output", str(tmp_path / "found.jsonl")]) == 0
    (line,) = read_results(tmp_path / "found.jsonl")
    assert (tmp_path / "evaluations" / "length" / "perplexity.png").stat().st_size > 10_000
    cases = line["results"]
    assert list(cases) == ["context 256", "context 1,024", "position 0 to 128", "position 128 to 256",
                           "position 256 to 1,024"]  # fmt: skip
    assert cases["context 1,024"]["examples"] == 3 * 1024
    assert cases["context 1,024"]["perplexity"] == pytest.approx(math.exp(cases["context 1,024"]["loss"]))
    whole = sum(cases[name]["loss"] * cases[name]["examples"] for name in cases if name.startswith("position"))
    assert whole / 3072 == pytest.approx(cases["context 1,024"]["loss"], rel=1e-6)
    assert line["notes"] == ["3 texts (documents), the same at every length"]
    capsys.readouterr()
    assert main([*command[:2], "suite.contexts=[64]"]) == 2
    assert "corpus.directory: names no corpus to read" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_give_the_result_of_one(command, tmp_path):
    assert main([*command, "--output", str(tmp_path / "one.jsonl")]) == 0
    arguments = [*command, "--output", str(tmp_path / "two.jsonl")]
    done = run_script(ROOT / "train" / "evaluate" / "__main__.py", arguments, 2)
    assert done.returncode == 0, done.stderr
    one, two = (read_results(tmp_path / name)[0]["results"] for name in ("one.jsonl", "two.jsonl"))
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-6)
