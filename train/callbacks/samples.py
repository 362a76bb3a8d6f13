"""samples.jsonl: what the model writes while it is trained.

The first line is the header, `{"kind": "header", "format_version": 1, "step": 0}`; each further one has `step`,
`prompt` and `text`, the continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipeline.tokenizing.tokenizer import Tokenizer
from model.generation import generate
from model.language_model import LanguageModel
from train.callbacks.base import Callback
from train.callbacks.step_lines import StepLines
from train.config import SamplesConfig
from train.decisions import CONTINUE, Decision, Rollback
from train.watch.whereabouts import BETWEEN_STEPS, SAMPLE
from train.whole_model import whole_model

if TYPE_CHECKING:
    from train.trainer import Trainer

FORMAT_VERSION = 1
_HEADER = {"kind": "header", "format_version": FORMAT_VERSION, "step": 0}


@dataclass(frozen=True)
class Sample:
    """A text and what the model wrote behind it."""

    prompt: str
    text: str


class Samples(Callback):
    """Every `logging.samples.interval` steps, has the model continue each prompt, and dispatches `on_samples`.

    Training is not touched: draws come from generators of their own, and the weights are only read.
    """

    def __init__(self) -> None:
        self._file: StepLines | None = None
        self._tokenizer: Tokenizer | None = None

    def on_run_start(self, trainer: Trainer) -> None:
        if trainer.is_main:
            self._tokenizer = Tokenizer.load(trainer.context.directory.tokenizer)
            self._go_on_from(trainer)

    def on_rollback(self, trainer: Trainer, rollback: Rollback, left: int) -> None:
        if self._file is not None:
            self._file.close()
            self._go_on_from(trainer)

    def _go_on_from(self, trainer: Trainer) -> None:
        self._file = StepLines(trainer.context.directory.samples, _HEADER, trainer.step)

    def on_step_end(self, trainer: Trainer) -> Decision:
        settings = trainer.config.logging.samples
        if trainer.step % settings.interval == 0:
            trainer.mesh.whereabouts.enter(SAMPLE)
            with whole_model(trainer.engine, trainer.config) as model:
                if model is not None:
                    assert self._tokenizer is not None and self._file is not None
                    samples = write_samples(model, self._tokenizer, settings)
                    for sample in samples:
                        self._file.append({"step": trainer.step, **vars(sample)})
                    trainer.dispatch("on_samples", samples)
            trainer.mesh.whereabouts.enter(BETWEEN_STEPS)
            trainer.restart_clock()
        return CONTINUE

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def write_samples(model: LanguageModel, tokenizer: Tokenizer, settings: SamplesConfig) -> Sequence[Sample]:
    """One sample of `model` for each prompt of `settings`, up to the end of a document."""
    # A text starts behind the end of another, as in training.
    prompts = [[tokenizer.eod_id, *tokenizer.encode(text)] for text in settings.prompts]
    tokens = generate(
        model,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.seed,
        stop_token=tokenizer.eod_id,
        vocab_size=tokenizer.vocab_size,
    )
    samples = []
    for prompt, ids, new in zip(settings.prompts, prompts, tokens.tolist(), strict=True):
        if tokenizer.eod_id in new:
            new = new[: new.index(tokenizer.eod_id)]
        # Decoded as one text: what a token reads as may depend on those before it.
        before, whole = tokenizer.decode(ids), tokenizer.decode([*ids, *new])
        samples.append(Sample(prompt, whole[len(before) :]))
    return samples
