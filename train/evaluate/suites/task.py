"""Suite `task`: how often a model answers rightly in a synthetic task, by the length of the examples.

The examples are of the split test, which no run trains on. An answer of several words is scored word by word behind the
right words before it, and once as a whole. The best word is looked for among all that the model has.

Axes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from conf.problems import ConfigError, at_least, choice
from data_pipeline.reading.batch import MASKED
from data_pipeline.reading.task_stream import TEST, TaskCorpus
from data_pipeline.tasks.config import SCORED, TaskConfig
from data_pipeline.tasks.tasks import TASKS, validate_task
from train.evaluate.suites.base import CaseResult, Subject, Suite, SuiteResult, SuiteSettings
from train.watch.whereabouts import EVALUATE


@dataclass(frozen=True)
class TaskSuiteSettings(SuiteSettings):
    """A synthetic task at several lengths."""

    # The task; null: that which the model's run was trained on.
    task: TaskConfig | None = None
    # Words of the examples, a case each; an example is as long as its form allows.
    lengths: list[int] = field(default_factory=lambda: [40, 64, 128, 256])
    # answer: the answer to the whole example. every: also those to its beginnings, of tasks that have them.
    scored: str = "answer"
    # Examples of each case.
    examples: int = 512
    # Examples of one forward pass on one rank.
    batch_size: int = 64
    # Of the examples.
    seed: int = 0


class TaskSuite(Suite[TaskSuiteSettings]):
    """`task`."""

    kind = "task"
    settings_class = TaskSuiteSettings

    def validate(self, settings: TaskSuiteSettings) -> list[str]:
        problems = [
            *at_least("suite.examples", settings.examples, 1),
            *at_least("suite.batch_size", settings.batch_size, 1),
            *choice("suite.scored", settings.scored, SCORED),
        ]
        if not settings.lengths:
            problems.append("suite.lengths: there is none; give one, such as [40]")
        if settings.task is not None and not problems:
            problems += self._problems_of_task(settings, settings.task)
        return problems

    def _problems_of_task(self, settings: TaskSuiteSettings, task: TaskConfig) -> list[str]:
        scored = dataclasses.replace(task, scored=settings.scored)
        found = (validate_task(scored, length, "suite.task") for length in sorted(settings.lengths))
        return next((problems for problems in found if problems), [])

    def run(self, subject: Subject, settings: TaskSuiteSettings, folder: Path) -> SuiteResult:
        corpus = TaskCorpus(self._task(subject, settings))
        if not corpus.tokenizer().gives_same_ids(subject.tokenizer()):
            raise ConfigError(
                [
                    f"suite.task: the model was trained with another tokenizer than the words of {corpus.config.name}; "
                    "score a model that was trained on it"
                ]
            )
        chance = corpus.task.chance(corpus.settings)
        cases = {
            f"{corpus.config.name}/{length}": self._case(subject, settings, corpus, length, chance)
            for length in settings.lengths
        }
        return SuiteResult(cases)

    def _task(self, subject: Subject, settings: TaskSuiteSettings) -> TaskConfig:
        task = settings.task or (subject.config.corpus.task if subject.has_run else None)
        if task is None:
            raise ConfigError(
                [
                    f"suite.task: the model's run was trained on none; name one of {', '.join(TASKS)}, such as "
                    "+suite.task.name=parity"
                ]
            )
        task = dataclasses.replace(task, scored=settings.scored)
        if problems := self._problems_of_task(settings, task):
            raise ConfigError(problems)
        # How short its examples may be says nothing here: each case has one length.
        return dataclasses.replace(task, shortest=1)

    def _case(
        self, subject: Subject, settings: TaskSuiteSettings, corpus: TaskCorpus, length: int, chance: float
    ) -> CaseResult:
        mesh = subject.mesh
        # Right words, scored words, examples that are right as a whole, sum of the losses.
        sums = torch.zeros(4, dtype=torch.float64)
        for first in range(mesh.data * settings.batch_size, settings.examples, settings.batch_size * mesh.shape.data):
            mesh.whereabouts.enter(EVALUATE)
            numbers = range(first, min(first + settings.batch_size, settings.examples))
            examples = [corpus.example(settings.seed, TEST, number, length, length) for number in numbers]
            longest = max(len(example.words) for example in examples)
            tokens, targets = (torch.from_numpy(array) for array in corpus.arrays(examples, longest))
            sums += scores(subject.logits(tokens), targets.to(subject.device)).cpu()
        right, words, whole, loss = mesh.sum(sums.to(subject.device), group="world").tolist()
        figures = {"accuracy": right / words, "loss": loss / words}
        if words > settings.examples:
            figures["exact"] = whole / settings.examples
        return CaseResult(figures, settings.examples, chance)


def scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Of logits [B, S, V] and targets [B, S] (MASKED: not scored): right words, scored words, rows in which all scored
    words are right, the sum of the losses in nats; [4] float64."""
    scored = targets != MASKED
    right = (logits.argmax(-1) == targets) & scored
    loss = torch.nn.functional.cross_entropy(logits[scored].double(), targets[scored], reduction="sum")
    whole = (right == scored).all(1)
    return torch.stack([right.sum().double(), scored.sum().double(), whole.sum().double(), loss])
