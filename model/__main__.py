"""Command line: `python -m model describe|generate|serve|export|import|average`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conf import ConfigError
from conf.command_line import exit_code, parse_arguments, refuse_undecodable
from conf.passwords import without_passwords
from data_pipeline.errors import DataError, TokenizerError
from model import generate_command
from model.command_settings import dtype_named, read_settings, refuse_url
from model.server import command as serve_command

# PyTorch takes a while to import: each command does so, the help does not.
if TYPE_CHECKING:
    from data_pipeline.tokenizing.tokenizer import Tokenizer

DESCRIBE_HELP = """\
Parameters, FLOPs and memory of a model, from its configuration alone: nothing is allocated.
Of a run also how far it is, its latest losses, its checkpoints, and the commands that come next.

  RUN                           a run's directory, in the place of what follows; also RUN@STEP, a checkpoint, a weights
                                directory or a Hugging Face directory
  model=CHOICE                  xlstm_7b (default), xlstm_160m, neurips_125m_7_1, llama_160m, tiny, ... (conf/model/)
  model.KEY=VALUE               any value of it, e.g. model.n_blocks=16

examples:
  python -m model describe runs/first
  python -m model describe exported
  python -m model describe model=xlstm_7b
  python -m model describe model=xlstm_1b4 --sequence-length 4096 --micro-batch-size 4 --ranks 64 --json
"""
EXPORT_HELP = """\
Write a model as a Hugging Face directory for transformers.AutoModelForCausalLM, and compare logits with it.
mLSTM blocks (tiny_mlstm, xlstm_*) become its xLSTM, attention blocks (tiny_llama, llama_*) its Llama. It has no other
model of ours: format=plugin writes any, for transformers beside this package.

  checkpoint=NAME               a run's directory (its newest complete checkpoint), RUN@STEP, a checkpoint or a weights
                                directory
  output=DIR                    must not exist yet, or be empty
  tokenizer=PATH                a tokenizer file or folder; null (default): the run's own
  format=transformers           an architecture of transformers: transformers; one that this package adds to it: plugin
  dtype=float32                 of the written weights: float32 | bfloat16
  verify=true                   false: do not compare logits (which needs transformers and twice the weights in memory)

examples:
  python -m model export checkpoint=runs/first output=exported
  python -m model export checkpoint=runs/first output=exported format=plugin
"""
IMPORT_HELP = """\
Read a Hugging Face directory of an xLSTM, a Llama or format=plugin and write it in this project's weights format.

  source=DIR                    holds config.json and safetensors files
  output=DIR                    must not exist yet, or be empty

example:
  python -m model import source=xLSTM-7b output=weights/xlstm_7b
"""
AVERAGE_HELP = """\
Average the weights of several models, such as of checkpoints of one run, and write them as a weights directory, which
generate, export and a run's initialise_from take.

  NAME NAME ...                 two or more, each a run's directory (its newest complete checkpoint), RUN@STEP, a
                                checkpoint, a weights directory or a Hugging Face directory
  output=DIR                    must not exist yet, or be empty
  weights=null                  one number for each, such as 2,1,1; null (default): all count the same

example:
  python -m model average runs/first@1000 runs/first@2000 output=averaged
"""


@dataclass(frozen=True)
class ExportSettings:
    checkpoint: str = "???"
    output: str = "???"
    tokenizer: str | None = None
    format: str = "transformers"
    dtype: str = "float32"
    verify: bool = True


@dataclass(frozen=True)
class ImportSettings:
    source: str = "???"
    output: str = "???"


@dataclass(frozen=True)
class AverageSettings:
    output: str = "???"
    weights: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code (docs/configuration.md)."""
    options = parse_arguments(_parser(), arguments)

    def run() -> int:
        refuse_undecodable(arguments)
        return options.run(options)

    return exit_code(run, (OSError,), "interrupted", (ValueError, DataError))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model", description="Look into models, use them, convert them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, summary: str, text: str, run: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        added.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings, see above")
        added.set_defaults(run=run)
        return added

    describe = command("describe", "parameters, FLOPs and memory of a configuration", DESCRIBE_HELP, _describe)
    describe.add_argument("--sequence-length", type=_positive, default=8192, metavar="S", help="tokens (default: 8192)")
    describe.add_argument("--micro-batch-size", type=_positive, default=1, metavar="B", help="sequences (default: 1)")
    describe.add_argument("--ranks", type=_positive, default=8, metavar="N", help="that ZeRO shards over (default: 8)")
    describe.add_argument(
        "--device", default="CPU", metavar="NAME", help="GPU whose kernels count, such as 'NVIDIA H200' (default: CPU)"
    )
    describe.add_argument("--json", action="store_true", help="print JSON with bytes and FLOPs unrounded")
    command("generate", "continue text with a trained model", generate_command.GENERATE_HELP, _generate)
    command("serve", "answer requests over HTTP, as OpenAI's interface does", serve_command.SERVE_HELP, _serve)
    command("export", "write a Hugging Face model directory", EXPORT_HELP, _export)
    command("import", "read a Hugging Face model directory", IMPORT_HELP, _import)
    average = command("average", "average the weights of several models", AVERAGE_HELP, _average)
    average.usage = "python -m model average [-h] NAME NAME ... output=DIR [weights=LIST]"
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no positive whole number")
    return int(text)


def _describe(options: argparse.Namespace) -> int:
    named = [setting for setting in options.settings if "=" not in setting]
    if named and len(options.settings) > 1:
        raise ConfigError([f"{named[0]}: a run is described as it is; leave the other settings out"])
    from conf import CONF_DIR, compose

    if named and not named[0].startswith(("-", "~")):
        if not Path(named[0]).exists() and (CONF_DIR / "model" / f"{named[0]}.yaml").is_file():
            raise ConfigError([f"{named[0]}: a preset is named with its key: model={named[0]}"])
        is_run = (Path(named[0]) / "config.yaml").is_file()
        return _describe_run(Path(named[0]), options) if is_run else _describe_weights(named[0], options)
    from model.config import ModelOnlyConfig, validate_model
    from model.describe import as_table, describe

    config = compose(
        ModelOnlyConfig, "model_only", options.settings, check=lambda rest: validate_model(rest.model)
    ).model
    problems = validate_model(config)
    if problems:
        raise ConfigError(problems)
    description = describe(config, options.sequence_length, options.micro_batch_size, options.ranks, options.device)
    print(json.dumps(description, indent=2) if options.json else as_table(description))
    return 0


def _describe_run(path: Path, options: argparse.Namespace) -> int:
    from conf import to_dataclass
    from model.config import ModelConfig, validate_model
    from model.describe import as_table, describe
    from train.run_summary import as_lines, summarise

    summary = summarise(path)
    config = to_dataclass(ModelConfig, summary.pop("model"))
    if problems := validate_model(config):
        raise ConfigError([f"{path / 'config.yaml'}: {problem}" for problem in problems])
    description = describe(config, options.sequence_length, options.micro_batch_size, options.ranks, options.device)
    if options.json:
        print(json.dumps({"run": summary, **description}, indent=2))
    else:
        print(f"{as_lines(summary)}\n\n{as_table(description)}")
    return 0


def _describe_weights(reference: str, options: argparse.Namespace) -> int:
    from model.describe import as_table, describe
    from model.loading import open_stored

    try:
        stored = open_stored(reference)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    sizes = (options.sequence_length, options.micro_batch_size, options.ranks, options.device)
    description = describe(stored.config, *sizes)
    located = stored.located
    where = {
        "weights": str(located.weights),
        "run": None if located.run is None else str(located.run),
        "step": located.step,
        "tokenizer": None if located.tokenizer is None else str(located.tokenizer),
    }
    if options.json:
        print(json.dumps({**where, **description}, indent=2))
    else:
        lines = [f"{key:<11} {value}" for key, value in where.items() if value is not None]
        print("\n".join([*lines, "", as_table(description)]))
    return 0


def _generate(options: argparse.Namespace) -> int:
    return generate_command.run(options.settings)


def _serve(options: argparse.Namespace) -> int:
    return serve_command.serve(options.settings)


def _export(options: argparse.Namespace) -> int:
    settings = read_settings(ExportSettings, options.settings)
    refuse_url(settings.output)

    from data_pipeline.tokenizing.tokenizer import Tokenizer
    from model.huggingface import OtherLogitsError, export_huggingface
    from model.locate import locate

    located = locate(settings.checkpoint)
    if located.is_huggingface:
        raise ConfigError([f"checkpoint: {located.weights} is a Hugging Face directory already; name a run or weights"])
    path = settings.tokenizer or located.tokenizer
    tokenizer = None if path is None else Tokenizer.load(path)
    try:
        notes = export_huggingface(
            located.weights,
            settings.output,
            tokenizer,
            format=settings.format,
            dtype=dtype_named(settings.dtype),
            verify=settings.verify,
            sequence_length=located.sequence_length,
        )
    except OtherLogitsError as error:
        # Nothing that was named is at fault.
        print(without_passwords(f"error: {error}"), file=sys.stderr)
        return 1
    if tokenizer is None:
        notes.append("no tokenizer was found and none was given: config.json names no bos and eos ids")
    for note in notes:
        print(f"note: {note}")
    checked = "logits equal in transformers" if settings.verify else "not compared with transformers"
    print(f"wrote {settings.output} ({checked})")
    return 0


def _import(options: argparse.Namespace) -> int:
    settings = read_settings(ImportSettings, options.settings)

    from model.huggingface import import_huggingface
    from model.weights import save_state_dict
    from model.whole_tensors import refuse_taken

    refuse_url(settings.output)
    refuse_taken(output := Path(settings.output))
    config, state_dict = import_huggingface(settings.source)
    save_state_dict(state_dict, config, output)
    tokenizer_json = Path(settings.source) / "tokenizer.json"
    if tokenizer_json.is_file():
        (output / "tokenizer").mkdir()
        (output / "tokenizer" / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    parameters = sum(tensor.numel() for tensor in state_dict.values())
    print(f"wrote {output}: {parameters:,} parameters in {len(state_dict)} tensors")
    return 0


def _average(options: argparse.Namespace) -> int:
    # A path that exists may hold "=".
    names = [text for text in options.settings if "=" not in text or Path(text.rpartition("@")[0] or text).exists()]
    settings = read_settings(AverageSettings, [text for text in options.settings if text not in names])
    problems = [] if len(names) > 1 else [f"name two models or more to average, not {len(names)}"]

    from model.averaging import average, misfits, share_problems
    from model.loading import open_stored

    shares: list[float] | None = None
    if settings.weights is not None:
        try:
            shares = [float(number) for number in settings.weights.split(",")]
            problems += share_problems(shares, len(names))
        except ValueError:
            problems.append(f"weights: numbers with commas between them are wanted, such as 2,1 ({settings.weights})")
    if problems:
        raise ConfigError(problems)

    sources = []
    for name in names:
        try:
            sources.append(open_stored(name))
        except ValueError as error:
            problems.append(str(error))
    if not problems:
        problems = misfits(sources)
    tokenizer, misfits_of_tokenizers = _common_tokenizer([source.located.tokenizer for source in sources])
    if problems := problems + misfits_of_tokenizers:
        raise ConfigError(problems)
    average(sources, settings.output, shares)
    if tokenizer is not None:
        tokenizer.save_to(Path(settings.output) / "tokenizer")
    print(f"wrote {settings.output}: the average of")
    for source in sources:
        print(f"  {source.located.checkpoint or source.located.weights}")
    return 0


def _common_tokenizer(paths: list[Path | None]) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of several models, the first that has one; and where others have another."""
    from data_pipeline.tokenizing.tokenizer import Tokenizer

    first: Tokenizer | None = None
    problems = []
    for path in dict.fromkeys(path for path in paths if path is not None):
        try:
            tokenizer = Tokenizer.load(path)
        except TokenizerError as error:
            problems.append(str(error))
            continue
        if first is None:
            first = tokenizer
        elif not first.gives_same_ids(tokenizer):
            problems.append(
                f"{first.path} and {tokenizer.path} are other tokenizers; ids mean other text to each model"
            )
    return first, problems


if __name__ == "__main__":
    sys.exit(main())
