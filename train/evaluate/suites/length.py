"""The suite `length`: how well a model predicts text far beyond what it was trained on, in constant memory.

Long held-out texts go through the model in pieces, with its state carried from piece to piece. All texts are read to
the same context, so that figures of different positions are of the same texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from conf.problems import ConfigError, at_least, choice
from data_pipeline.corpus.corpus import Corpus
from model.accounting import state_elements
from model.config import ModelConfig
from model.state import ModelState
from train.data import open_corpus
from train.evaluate.suites.base import CaseResult, Subject, Suite, SuiteResult, SuiteSettings
from train.evaluate.suites.long_texts import DOCUMENTS, TEXTS, LongText, find_long_texts
from train.figure import BLUE, ORANGE, STYLE, as_png, name_axes

# The first border of positions; each further one is twice as far, up to the first context.
_FIRST_POSITIONS = 128
PICTURE = "perplexity.png"


@dataclass(frozen=True)
class LengthSettings(SuiteSettings):
    """Which texts are read, and how far."""

    # Numbers of tokens, rising, up to which the perplexity is taken from the beginning of a text.
    contexts: list[int] = field(default_factory=lambda: [2048, 4096, 8192, 16384, 32768, 65536, 131072])
    # Of the corpus (corpus.directory: that of the model's run, unless it is said).
    split: str = "validation"
    # One of its sources alone; null: all.
    source: str | None = None
    # documents: those that have the longest context's tokens, each from its beginning. joined: what stands one behind
    # the other in the corpus, for a corpus without long documents.
    text: str = DOCUMENTS
    # Texts that are read at most.
    texts: int = 16
    # Of these, so many at a time on each process.
    batch_size: int = 1
    # Tokens that go through the model at a time.
    piece: int = 2048
    # Models whose memory grows with the text (attention) are read so far at most; longer contexts are left out.
    max_cached_tokens: int = 32768


class LengthSuite(Suite[LengthSettings]):
    kind = "length"
    settings_class = LengthSettings

    def validate(self, settings: LengthSettings) -> list[str]:
        problems = []
        contexts = settings.contexts
        if not contexts or any(context < 1 for context in contexts) or sorted(set(contexts)) != contexts:
            problems.append(f"suite.contexts: must be numbers of tokens, at least 1 and rising ({contexts})")
        return [
            *problems,
            *choice("suite.text", settings.text, TEXTS),
            *at_least("suite.texts", settings.texts, 1),
            *at_least("suite.batch_size", settings.batch_size, 1),
            *at_least("suite.piece", settings.piece, 1),
            *at_least("suite.max_cached_tokens", settings.max_cached_tokens, 1),
        ]

    def run(self, subject: Subject, settings: LengthSettings, folder: Path) -> SuiteResult:
        """Perplexity (and loss, nats per token) up to each context, and between positions; leaves perplexity.png."""
        contexts, notes = contexts_of(subject.model.config, settings)
        corpus = _corpus(subject)
        # Behind the last token that is read stands the last one to be predicted.
        texts = find_long_texts(
            corpus, settings.split, settings.source, settings.text, contexts[-1] + 1, settings.texts
        )
        borders = position_borders(contexts)
        sums = _sum_losses(subject, settings, texts, borders)
        positions = {
            f"position {low:,} to {high:,}": _case(sums[place], len(texts) * (high - low))
            for place, (low, high) in enumerate(zip(borders[:-1], borders[1:], strict=True))
        }
        up_to = {
            f"context {context:,}": _case(sums[: borders.index(context)].sum(), len(texts) * context)
            for context in contexts
        }
        count = "1 text" if len(texts) == 1 else f"{len(texts):,} texts"
        notes.append(f"{count} ({settings.text}), the same at every length")
        if subject.mesh.is_main:
            (folder / PICTURE).write_bytes(as_png(length_figure(subject, borders, positions, contexts, up_to)))
        return SuiteResult(up_to | positions, notes)


def contexts_of(model: ModelConfig, settings: LengthSettings) -> tuple[list[int], list[str]]:
    """The contexts to which a model is read, and a note where some are left out. Raises ConfigError if all are."""
    if not state_elements(model)["cache_per_token"]:
        return settings.contexts, []
    most = settings.max_cached_tokens
    contexts = [context for context in settings.contexts if context <= most]
    if not contexts:
        raise ConfigError(
            [
                f"suite.max_cached_tokens: this model keeps keys and values of every token, and the shortest context "
                f"({settings.contexts[0]:,}) is longer than it may ({most:,}); raise it, or add shorter contexts"
            ]
        )
    if contexts == settings.contexts:
        return contexts, []
    note = f"attention keeps all tokens: read up to {contexts[-1]:,} of {settings.contexts[-1]:,} tokens"
    return contexts, [f"{note} (suite.max_cached_tokens)"]


def position_borders(contexts: list[int]) -> list[int]:
    """0, doubling positions from 128 below the first context, and the contexts."""
    below, position = [], _FIRST_POSITIONS
    while position < contexts[0]:
        below.append(position)
        position *= 2
    return [0, *below, *contexts]


def _corpus(subject: Subject) -> Corpus:
    directory = subject.config.corpus.directory
    if directory is None:
        raise ConfigError(["corpus.directory: names no corpus to read; give corpus.directory=DIR"])
    corpus = open_corpus(subject.config, directory, "size")
    vocab_size = subject.model.config.vocab_size
    if corpus.vocab_size > vocab_size:
        raise ConfigError(
            [
                f"corpus.directory: the tokenizer of {corpus.directory} has {corpus.vocab_size} ids, the model "
                f"{vocab_size}; prepare the corpus with the model's tokenizer"
            ]
        )
    return corpus


def _sum_losses(subject: Subject, settings: LengthSettings, texts: list[LongText], borders: list[int]) -> np.ndarray:
    """Sums of the losses of all texts, in nats, from each border to the next: [borders - 1] float64. Collective."""
    mesh = subject.mesh
    own = texts[mesh.rank :: mesh.size_of("world")]
    sums = np.zeros(len(borders) - 1)
    for first in range(0, len(own), settings.batch_size):
        sums += losses_between(subject, own[first : first + settings.batch_size], borders, settings.piece)
    total = torch.from_numpy(sums).to(mesh.device)
    return mesh.sum(total, group="world").cpu().numpy()


def losses_between(subject: Subject, texts: list[LongText], borders: list[int], piece: int) -> np.ndarray:
    """Sums of the losses of these texts (nats) from each border to the next, with the state carried between pieces."""
    sums = np.zeros(len(borders) - 1)
    state: ModelState | None = None
    for begin in range(0, borders[-1], piece):
        count = min(piece, borders[-1] - begin)
        tokens = torch.from_numpy(np.stack([text.read(begin, count + 1) for text in texts])).to(subject.device)
        with subject.autocast():
            output = subject.model(tokens[:, :-1], targets=tokens[:, 1:], state=state, return_state=True)
        state = output.state
        losses = output.token_losses.double().sum(0).cpu().numpy()
        places = np.searchsorted(borders, np.arange(begin, begin + count), side="right") - 1
        np.add.at(sums, places, losses)
    return sums


def _case(loss_sum: float, tokens: int) -> CaseResult:
    loss = float(loss_sum) / tokens
    return CaseResult({"loss": loss, "perplexity": math.exp(min(loss, 700.0))}, tokens)


@matplotlib.rc_context(STYLE)
def length_figure(
    subject: Subject,
    borders: list[int],
    positions: dict[str, CaseResult],
    contexts: list[int],
    up_to: dict[str, CaseResult],
) -> Figure:
    """Perplexity over the position in a text, and up to each context, with the length of training."""
    figure = Figure(figsize=(7.0, 4.2))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    between = [case.figures["perplexity"] for case in positions.values()]
    # A logarithmic axis has no 0.
    places = [max(border, borders[1] / 2) for border in borders]
    axes.stairs(between, places, baseline=None, color=BLUE, label="between positions")
    upto = [case.figures["perplexity"] for case in up_to.values()]
    axes.plot(contexts, upto, color=ORANGE, marker="o", label="all up to a context")
    if subject.has_run:
        length = subject.config.training.sequence_length
        axes.axvline(length, color="gray", linestyle=":", linewidth=1, label=f"trained at {length:,}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    name_axes(axes, "Perplexity by length", "exp(nats per token), the same texts at every length", "tokens of the text")
    return figure
