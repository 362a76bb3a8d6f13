"""Numbers hidden in text: what an example is, and that pieces score it as one pass does."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from conf import ConfigError
from data_pipeline.corpus.corpus import Corpus
from model.initialisation import initialise
from model.language_model import LanguageModel
from model.locate import Located
from tests.model.conftest import CONFIGS
from train.config import PrecisionConfig, RunConfig
from train.evaluate.suites.base import Subject
from train.evaluate.suites.needle import Hidden, NeedleSettings, NeedleSuite, _lines, answer_scores, example
from train.parallel.mesh import join_mesh


@pytest.fixture(scope="module")
def tokenizer(small_corpus):
    return Corpus.open(small_corpus).tokenizer()


@pytest.fixture
def settings(tmp_path):
    lines = [f"line {number} of a text, with {number % 7} words or so\n" for number in range(400)]
    (tmp_path / "text.txt").write_text("".join(lines))
    return NeedleSettings("needle", str(tmp_path / "text.txt"), [400], [0.0, 0.5, 1.0], needles=3)


def test_the_sentence_stands_at_its_depth_and_its_number_is_the_answer(settings, tokenizer, tmp_path):
    lines = _lines(tmp_path / "text.txt", tokenizer)
    longest = max(map(len, lines))
    seen = set()
    for number in range(6):
        for depth in settings.depths:
            hidden = example(lines, tokenizer, settings, 400, depth, number)
            assert 400 - longest < len(hidden.prompt) + len(hidden.answer) <= 400
            text = tokenizer.decode(hidden.prompt)
            *above, asked = text.splitlines()
            word = asked.removeprefix("The secret number of ").removesuffix(" is").removesuffix(" is ")
            told = {line.split()[4]: line.split()[6].rstrip(".") for line in above if line.startswith("The secret")}
            assert len(told) == 3 and tokenizer.decode(hidden.prompt + hidden.answer).endswith(f"is {told[word]}")
            plain = [line for line in above if not line.startswith("The secret") or word in line]
            place = next(place for place, line in enumerate(plain) if line.startswith("The secret"))
            assert place == round(depth * (len(plain) - 1))
            seen.add((word, told[word]))
    assert len(seen) == 6


@pytest.mark.parametrize("name", ["mlstm", "attention", "neurips_mlstm_and_slstm"])
def test_pieces_score_an_answer_as_one_pass_does(name):
    model = LanguageModel(CONFIGS[name]).double().eval()
    initialise(model, seed=0)
    mesh = join_mesh(timedelta(seconds=60))
    try:
        config = RunConfig(name="x", precision=PrecisionConfig("fp32"))
        subject = Subject(model, Located(None, None), config, mesh, False)
        tokens = torch.randint(61, (30,), generator=torch.Generator().manual_seed(0)).tolist()
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        best = [*tokens[:26], int(logits[25].argmax())]
        for prompt, answer, is_right in ((tokens[:26], tokens[26:], False), (tokens[:26], best[26:], True)):
            whole = torch.tensor([prompt + answer])
            with torch.no_grad():
                expected = model(whole[:, :-1], targets=whole[:, 1:]).token_losses[0, 25:].sum()
            for piece in (7, 100):
                loss, right = answer_scores(subject, Hidden(prompt, answer), piece)
                assert loss == pytest.approx(float(expected), rel=1e-9) and right == is_right
    finally:
        mesh.close()


def test_what_does_not_fit_is_refused(settings, tokenizer, tmp_path):
    lines = _lines(tmp_path / "text.txt", tokenizer)
    with pytest.raises(ConfigError, match=r"suite.contexts: 20 tokens have no room for 3 sentences; raise it"):
        example(lines, tokenizer, settings, 20, 0.5, 0)
    with pytest.raises(ConfigError, match=r"suite.text: .* has .* tokens, fewer than .*; name a longer text, or lower"):
        example(lines, tokenizer, settings, 100_000, 0.5, 0)
    wrong = NeedleSettings("needle", "nowhere", [], [2.0], needles=99)
    assert [problem.split(":")[0] for problem in NeedleSuite().validate(wrong)] == [
        "suite.needles",
        "suite.contexts",
        "suite.depths",
        "suite.text",
    ]
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="binary is no UTF-8 text"):
        _lines(tmp_path / "binary", tokenizer)
