"""What `python -m train.evaluate` does: held-out losses of a trained model."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from conf import ConfigError
from conf.passwords import without_passwords
from conf.problems import at_least, suggestion
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import DataError, MachineError
from data_pipeline.reading.batch import Batch
from model.language_model import LanguageModel
from model.loading import load
from train.checkpoints.layout import CheckpointError
from train.checkpoints.state import read_state
from train.config import RunConfig
from train.data import open_run_corpus
from train.evaluate import EvaluationResult, evaluate, open_evaluation_corpora, open_sets
from train.evaluate.suites.command import names_suite, run_suite
from train.evaluate.target import Target, compose_for, find
from train.origin import other_tokenizer, unknown_tokenizer
from train.parallel.mesh import Mesh, join_mesh
from train.parallel.time_chunks import TimeChunks
from train.parallel.token_loss import TokenLossSum, on_device
from train.requirements import data_as_configured, misfits_of_evaluation
from train.run_directory import write_atomically
from train.validate import validate_evaluation

FORMAT_VERSION = 1
HELP = """\
Score held-out text with a trained model:  python -m train.evaluate MODEL [--output FILE] [key=value ...]
On several GPUs:  python -m torch.distributed.run --standalone --nproc-per-node=2 -m train.evaluate MODEL ...

MODEL is a run's directory (its newest complete checkpoint), RUN@STEP, a checkpoint (step-XXXXXXXX), a weights directory
or a Hugging Face directory. A run brings its configuration: corpus, evaluation sets, sequence length, precision.
A set of a whole split is scored by source too. What else has no run: give corpus.directory=DIR at least.

Values of a run's configuration can be set (docs/configuration.md), such as
  corpus.directory=DIR                          another corpus of the same tokenizer
  evaluation.sets.validation.split=test         another split
  evaluation.sets.validation.max_tokens=null    all of it, where the run scored a part
  evaluation.sets.validation.by_source=true     each source of a part
  evaluation.batch_size=32  training.sequence_length=8192  precision=fp32

Prints loss (nats per token), perplexity and tokens, and writes them as JSON to RUN/evaluations/step-XXXXXXXX.json, or
to MODEL/evaluation.json where there is no run, or to FILE.

suite=NAME scores by a suite in place of held-out text (docs/guides/evaluation.md); its settings are suite.key=value.
The result is one more line of RUN/evaluations.jsonl, of evaluations.jsonl beside the weights, or of FILE.
"""


class ModelScorer:
    """`train.evaluate.Scorer` of a model that every rank holds whole."""

    def __init__(self, model: LanguageModel, config: RunConfig, mesh: Mesh):
        self.mesh = mesh
        self._module = TokenLossSum(model, 0.0).eval()
        self._autocast = config.precision.uses_autocast(config.parallel.zero_stage)
        self._dtype = config.precision.compute_dtype
        self._time_chunks = TimeChunks(config.training.time_chunk)

    def evaluate_batch(self, batch: Batch) -> tuple[float, int]:
        """(sum of the losses in nats, scored targets) of a batch."""
        with torch.no_grad(), torch.autocast(self.mesh.device.type, self._dtype, enabled=self._autocast):
            of_batch = on_device(batch, self.mesh.device)
            return float(self._time_chunks.loss_sum(self._module, of_batch)), batch.scored_targets()


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code (docs/configuration.md)."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        _evaluate(list(arguments))
    except ConfigError as error:
        print(f"train.evaluate: {error}", file=sys.stderr)
        return 2
    except (DataError, CheckpointError, OSError, ValueError) as error:
        print(without_passwords(f"train.evaluate: {error}"), file=sys.stderr)
        return 1 if isinstance(error, (MachineError, OSError)) else 2
    return 0


def _evaluate(arguments: list[str]) -> None:
    output = None
    if "--output" in arguments:
        place = arguments.index("--output")
        if place + 1 == len(arguments):
            raise ConfigError(["--output: name the file to write"])
        output = Path(arguments.pop(place + 1))
        del arguments[place]
    if unknown := [argument for argument in arguments if argument.startswith("--")]:
        raise ConfigError([f"{one}: no such option{suggestion(one, ['--output'])}" for one in unknown])
    named = [argument for argument in arguments if "=" not in argument]
    if len(named) != 1:
        raise ConfigError(
            [f"name one model: a run, RUN@STEP, a checkpoint or a weights directory (not {' '.join(named) or 'none'})"]
        )
    target, overrides = find(Path(named[0])), [argument for argument in arguments if "=" in argument]
    if names_suite(overrides):
        run_suite(target, overrides, output)
        return
    config = _configuration(target, overrides)
    corpora = _open_corpora(config, target)
    mesh = join_mesh(timedelta(seconds=config.parallel.collective_timeout_seconds))
    try:
        dtype = config.precision.weight_dtype(config.parallel.zero_stage)
        model = load(target.path, device=mesh.device, dtype=dtype)
        _check_vocabulary(corpora, model)
        results = evaluate(ModelScorer(model, config, mesh), config, corpora)
        if mesh.is_main:
            if target.located.tokenizer is None:
                print(f"WARNING    {unknown_tokenizer(target.path)}", file=sys.stderr)
            _write(output or _output(target), _document(target, config, corpora, model, results))
    finally:
        mesh.close()


def _configuration(target: Target, overrides: list[str]) -> RunConfig:
    """The run's configuration, or the defaults, with `overrides`; whole splits by source, unless they say otherwise."""
    config = compose_for(target, overrides, _problems)
    if any("by_source" in override for override in overrides):
        return config
    sets = {
        # A part of a split would be another part by source, with another loss.
        name: dataclasses.replace(one, by_source=one.by_source or (one.source is None and one.max_tokens is None))
        for name, one in config.evaluation.sets.items()
    }
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, sets=sets))


def _problems(config: RunConfig) -> list[str]:
    problems = [
        *validate_evaluation(config),
        *at_least("training.sequence_length", config.training.sequence_length, 1),
    ]
    if not config.evaluation.sets:
        problems.append("evaluation.sets: there is none to score; give evaluation=validation")
    return problems


def _output(target: Target) -> Path:
    """Where the result goes, unless it is said."""
    if target.run is None or target.checkpoint is None:
        return target.path / "evaluation.json"
    return target.run / "evaluations" / f"{target.checkpoint.name}.json"


def _open_corpora(config: RunConfig, target: Target) -> dict[str, Corpus]:
    with data_as_configured():
        corpus = open_run_corpus(config, "size")
        corpora = open_evaluation_corpora(config, corpus)
    problems = misfits_of_evaluation(config, corpora)
    if target.located.tokenizer is not None:
        problems += other_tokenizer(str(target.path), target.located.tokenizer, corpus)
    if problems:
        raise ConfigError(problems)
    return corpora


def _check_vocabulary(corpora: dict[str, Corpus], model: LanguageModel) -> None:
    for corpus in corpora.values():
        if corpus.vocab_size > model.config.vocab_size:
            raise ConfigError(
                [
                    f"corpus.directory: the tokenizer of {corpus.directory} has {corpus.vocab_size} ids, the model "
                    f"{model.config.vocab_size}; prepare the corpus with the model's tokenizer"
                ]
            )


def _document(
    target: Target,
    config: RunConfig,
    corpora: dict[str, Corpus],
    model: LanguageModel,
    results: dict[str, EvaluationResult],
) -> dict[str, Any]:
    """What is written (docs/training.md)."""
    windows = open_sets(config, corpora)
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": str(target.path),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step": None,
        "trained_tokens": None,
        "sequence_length": config.training.sequence_length,
        "precision": config.precision.compute,
        "sets": {name: dataclasses.asdict(one) for name, one in config.evaluation.sets.items()},
        "results": {},
    }
    if target.checkpoint is not None:
        state = read_state(target.checkpoint)
        document |= {"step": state.step, "trained_tokens": state.tokens}
    for name, result in results.items():
        fingerprint = windows[name].fingerprint if name in windows else None
        document["results"][name] = {**dataclasses.asdict(result), "fingerprint": fingerprint}
    for name, one in document["sets"].items():
        one["directory"] = str(corpora[name].directory)
    return document


def _write(path: Path, document: dict[str, Any]) -> None:
    """Print the results as a table, and write all of `document`."""
    width = max(len(name) for name in document["results"])
    print(f"{'set':<{width}}  {'loss':>8}  {'perplexity':>12}  {'tokens':>14}")
    for name, result in document["results"].items():
        figures = f"{result['loss']:>8.4f}  {result['perplexity']:>12,.2f}  {result['tokens']:>14,}"
        print(f"{name:<{width}}  {figures}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}); name another file with --output") from None
    print(f"written to {path}")
