"""What an evaluation suite is: a name, a dataclass of settings, and a way to score a model, case by case.

A suite is a file of this folder with a class that derives from `Suite`, and is listed in `suites.py`. Its settings are
files of conf/suite/: `python -m train.evaluate MODEL suite=NAME suite.key=value` takes conf/suite/NAME.yaml, whose
`kind` names the class.

Axes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from conf.problems import ConfigError
from data_pipeline.tokenizing.tokenizer import Tokenizer
from model.language_model import LanguageModel
from model.locate import Located
from train.config import RunConfig
from train.parallel.mesh import Mesh

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class SuiteSettings:
    """What the settings of every suite begin with."""

    # The suite, of those that train/evaluate/suites has.
    kind: str


@dataclass(frozen=True)
class Subject:
    """The model that a suite scores, and what is known of it. Every rank holds the whole model.

    Attributes:
        model: in evaluation mode, on the mesh's device.
        located: where its weights and its tokenizer lie.
        config: of the run that it is of, else the defaults; its model section is not used: `model.config` is the model.
        has_run: whether `config` is that of a run.
    """

    model: LanguageModel
    located: Located
    config: RunConfig
    mesh: Mesh
    has_run: bool

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    def tokenizer(self) -> Tokenizer:
        """Of the model. Raises ConfigError where none lies beside it."""
        if self.located.tokenizer is None:
            raise ConfigError([f"{self.located.weights}: no tokenizer lies beside these weights; put one there"])
        return Tokenizer.load(self.located.tokenizer)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around every call of the model: computes in the configured precision, without gradients."""
        precision = self.config.precision
        enabled = precision.uses_autocast(self.config.parallel.zero_stage)
        context = contextlib.ExitStack()
        context.enter_context(torch.no_grad())
        context.enter_context(torch.autocast(self.device.type, precision.compute_dtype, enabled=enabled))
        return context

    def logits(self, tokens: Tensor, document_start: Tensor | None = None) -> Tensor:
        """[B, S, V] of tokens [B, S] int64 and document_start [B, S] bool, which need not be on the device."""
        with self.autocast():
            starts = None if document_start is None else document_start.to(self.device)
            found = self.model(tokens.to(self.device), document_start=starts).logits
        assert found is not None
        return found


@dataclass(frozen=True)
class CaseResult:
    """What a suite found in one case: a task at a length, a context, a task of others.

    Attributes:
        figures: numbers by name, such as accuracy, perplexity or loss.
        examples: how many examples (or tokens) they are means of.
        chance: the accuracy of a guess among the answers that there may be; None: there is none, or no accuracy.
    """

    figures: dict[str, float]
    examples: int
    chance: float | None = None

    @property
    def scaled_accuracy(self) -> float | None:
        """(accuracy - chance) / (1 - chance), as arXiv 2405.04517 reports it; None without a chance level below 1."""
        if self.chance is None or self.chance >= 1 or "accuracy" not in self.figures:
            return None
        return (self.figures["accuracy"] - self.chance) / (1 - self.chance)


@dataclass(frozen=True)
class SuiteResult:
    """All cases of one suite, in the order of its table. `notes`: what a reader of the numbers must know."""

    cases: dict[str, CaseResult]
    notes: list[str] = field(default_factory=list)


class Suite(ABC, Generic[Settings]):
    """One suite. It holds nothing: what it needs it is given.

    Attributes:
        kind: what configurations call it.
        settings_class: frozen dataclass of its settings, derived from SuiteSettings.
    """

    kind: ClassVar[str]
    settings_class: ClassVar[type[SuiteSettings]]

    @abstractmethod
    def validate(self, settings: Settings) -> list[str]:
        """Every problem of the settings that shows without the model, one line each, with the keys under `suite`."""

    @abstractmethod
    def run(self, subject: Subject, settings: Settings, folder: Path) -> SuiteResult:
        """Score the model. Collective: all ranks call it and get equal results.

        `folder`: where rank 0 may leave files (pictures, answers, progress); it is there on rank 0 alone. Raises
        ConfigError where model and settings do not fit each other.
        """
