"""Suite `needle`: whether a model finds again what it has read, by how long ago it was.

Sentences "The secret number of WORD is NUMBER." are put between the lines of a text, one of them at the depth that is
tested, the others anywhere; behind the text the number of that one is asked for. Every token of the answer must be the
most likely one behind the right tokens before it, which is what greedy decoding writes. In the manner of RULER (arXiv
2404.06654): one needle, or several of which one is asked for.

The text goes through the model in pieces, with its state carried from piece to piece.

Axes: B batch (1 here), S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from conf.problems import ConfigError, at_least
from data_pipeline.tasks.draws import Draws
from data_pipeline.tokenizing.tokenizer import Tokenizer
from train.evaluate.suites.base import CaseResult, Subject, Suite, SuiteResult, SuiteSettings
from train.watch.whereabouts import EVALUATE

# fmt: off
_WORDS = (
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer",
    "island", "jacket", "kettle", "ladder", "meadow", "needle", "orange", "pencil",
    "quarry", "ribbon", "saddle", "tunnel", "velvet", "window", "anchor", "basket",
    "copper", "dragon", "falcon", "guitar", "harbor", "ivory", "jungle", "lantern",
)
# fmt: on
_DIGITS = 5


@dataclass(frozen=True)
class NeedleSettings(SuiteSettings):
    """Which text is read, how far, and what is hidden in it."""

    # A UTF-8 file with the text, to be named; it must have as many tokens as the longest context.
    text: str | None = None
    # Tokens of each example, sentences and question included.
    contexts: list[int] = field(default_factory=lambda: [1024, 2048, 4096, 8192])
    # Where the sentence that is asked for stands: 0 at the beginning, 1 at the end of the text.
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    # Sentences in each example, of which one is asked for.
    needles: int = 1
    # Examples of each context and depth.
    examples: int = 8
    # Tokens that go through the model at a time.
    piece: int = 2048
    # Of words, numbers and places.
    seed: int = 0


@dataclass(frozen=True)
class Hidden:
    """One example: `prompt` ends with the question, `answer` is what is to follow."""

    prompt: list[int]
    answer: list[int]


class NeedleSuite(Suite[NeedleSettings]):
    """`needle`."""

    kind = "needle"
    settings_class = NeedleSettings

    def validate(self, settings: NeedleSettings) -> list[str]:
        problems = [
            *at_least("suite.examples", settings.examples, 1),
            *at_least("suite.piece", settings.piece, 1),
            *at_least("suite.needles", settings.needles, 1),
            *(problem for context in settings.contexts for problem in at_least("suite.contexts", context, 1)),
        ]
        if settings.needles > len(_WORDS):
            problems.append(f"suite.needles: there are words for {len(_WORDS)} at most ({settings.needles})")
        problems += [
            f"suite.{key}: there is none; give one" for key in ("contexts", "depths") if not getattr(settings, key)
        ]
        problems += [
            f"suite.depths: must be between 0 and 1 ({depth:g})" for depth in settings.depths if not 0 <= depth <= 1
        ]
        if settings.text is None or not Path(settings.text).is_file():
            shown = "null" if settings.text is None else settings.text
            problems.append(f"suite.text: is no file ({shown}); set suite.text=FILE, of the text to read")
        return problems

    def run(self, subject: Subject, settings: NeedleSettings, folder: Path) -> SuiteResult:
        tokenizer = subject.tokenizer()
        assert settings.text is not None, "validate() wants a file"
        lines = _lines(Path(settings.text), tokenizer)
        cases: dict[str, CaseResult] = {}
        for context in settings.contexts:
            of_context = {
                f"{context}/{depth:g}": self._case(subject, settings, lines, tokenizer, context, depth)
                for depth in settings.depths
            }
            exact = [case.figures["accuracy"] for case in of_context.values()]
            mean = sum(exact) / len(exact)
            cases |= {f"{context}": CaseResult({"accuracy": mean}, settings.examples * len(exact)), **of_context}
        note = f"{settings.needles} hidden; accuracy: greedy answers of {_DIGITS} digits that are right as a whole"
        return SuiteResult(cases, [note])

    def _case(
        self,
        subject: Subject,
        settings: NeedleSettings,
        lines: list[list[int]],
        tokenizer: Tokenizer,
        context: int,
        depth: float,
    ) -> CaseResult:
        mesh = subject.mesh
        sums = torch.zeros(2, dtype=torch.float64)
        for number in range(mesh.data, settings.examples, mesh.shape.data):
            mesh.whereabouts.enter(EVALUATE)
            hidden = example(lines, tokenizer, settings, context, depth, number)
            losses, right = answer_scores(subject, hidden, settings.piece)
            sums += torch.tensor([float(right), losses / len(hidden.answer)], dtype=torch.float64)
        right, loss = mesh.sum(sums.to(subject.device), group="world").tolist()
        return CaseResult({"accuracy": right / settings.examples, "loss": loss / settings.examples}, settings.examples)


def _lines(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of each line, its end included. Raises ConfigError where the file is no text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([f"suite.text: {path} is no UTF-8 text ({error.reason}); name another file"]) from None
    return [ids.tolist() for ids in tokenizer.encode_batch(text.splitlines(keepends=True))]


def example(
    lines: list[list[int]], tokenizer: Tokenizer, settings: NeedleSettings, context: int, depth: float, number: int
) -> Hidden:
    """Example `number` of a context and a depth: prompt and answer have `context` tokens together, or one line less.

    Raises ConfigError where the text is too short for it, or the context for the sentences.
    """
    draws = Draws("needle", settings.seed, context, number)
    words = [_WORDS[place] for place in draws.distinct(len(_WORDS), settings.needles)]
    secrets = ["".join(map(str, draws.below(10, _DIGITS))) for _ in words]
    sentences = [
        tokenizer.encode(f"The secret number of {word} is {secret}.\n")
        for word, secret in zip(words, secrets, strict=True)
    ]
    question, answer = _question(tokenizer, words[0], secrets[0])
    room = context - len(question) - len(answer) - sum(map(len, sentences))
    if room < 0:
        raise ConfigError([f"suite.contexts: {context} tokens have no room for {len(words)} sentences; raise it"])
    total = sum(map(len, lines))
    if total < room:
        raise ConfigError(
            [
                f"suite.text: {settings.text} has {total:,} tokens, fewer than {room:,}; name a longer text, or lower "
                f"suite.contexts ({context})"
            ]
        )
    # Whole lines from a random one on, round the end of the text.
    haystack: list[list[int]] = []
    place, length = draws.one_below(len(lines)), 0
    while length + len(lines[place]) <= room and len(haystack) < len(lines):
        haystack.append(lines[place])
        length += len(lines[place])
        place = (place + 1) % len(lines)
    places = [round(depth * len(haystack)), *draws.below(len(haystack) + 1, len(words) - 1)]
    parts = [[line] for line in [*haystack, []]]
    for sentence, at in zip(sentences, places, strict=True):
        parts[at].insert(0, sentence)
    return Hidden([token for part in parts for line in part for token in line] + question, answer)


def _question(tokenizer: Tokenizer, word: str, secret: str) -> tuple[list[int], list[int]]:
    """The tokens of the question and of the answer behind it, as the sentence itself is tokenized."""
    asked = f"The secret number of {word} is"
    alone, whole = tokenizer.encode(asked), tokenizer.encode(f"{asked} {secret}")
    shared = 0
    while shared < min(len(alone), len(whole)) and alone[shared] == whole[shared]:
        shared += 1
    return whole[:shared], whole[shared:]


def answer_scores(subject: Subject, hidden: Hidden, piece: int) -> tuple[float, bool]:
    """(sum of the answer's losses in nats, whether each of its tokens is the most likely one)."""
    tokens = torch.tensor([[*hidden.prompt, *hidden.answer[:-1]]], device=subject.device)
    # Logits are of the last piece alone.
    last = len(hidden.answer)
    state = None
    with subject.autocast():
        for begin in range(0, tokens.shape[1] - last, piece):
            part = tokens[:, begin : min(begin + piece, tokens.shape[1] - last)]
            state = subject.model.advance(part, state=state)
        logits = subject.model(tokens[:, -last:], state=state).logits
    assert logits is not None
    targets = torch.tensor(hidden.answer, device=subject.device)
    losses = torch.nn.functional.cross_entropy(logits[0].double(), targets, reduction="sum")
    return float(losses), bool((logits[0].argmax(-1) == targets).all())
