"""Command line: `python -m data_pipeline prepare|inspect|verify|merge|split`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from conf.command_line import exit_code, parse_arguments, refuse_undecodable
from conf.lasting_output import lasting_output
from conf.problems import ConfigError, at_least
from conf.stored_values import fits
from data_pipeline.errors import DataError, MachineError
from data_pipeline.ordering.config import OrderConfig

PREPARE_HELP = """\
Tokenize text into a corpus folder that `python -m train` reads.

Settings are Hydra overrides (KEY=VALUE). The most used:
  output=DIR                    the corpus folder (required)
  data=CHOICE                   standard_library (default) | text | slimpajama | dclm | records | jsonl | parquet |
                                datasets
  source=PATH                   folder or file to read, or datasets:NAME for what the library `datasets` opens
  workers=N                     processes of this command (default: 1)
  data.source_field=FIELD       field of a record with its source label, e.g. meta.redpajama_set_name
  data.split.validation_fraction=0.01
  tokenizer=CHOICE              sentencepiece_4k (default) | sentencepiece_32k | file
  tokenizer.path=FILE           with tokenizer=file: a SentencePiece .model or a Hugging Face tokenizer.json
  tokenizer.backend=auto        reference | gigatoken | fastokens | splintr: the library that encodes
  data.tolerance.rejected_fraction=0.001, data.tolerance.damaged_files=0     what may be lost of the input

It may be killed at any moment: the same command goes on where it stopped, and does nothing when all is done. Started
several times with one output, on one node or many (a Slurm array needs nothing more), the commands share the work; the
last one to end finishes the corpus. The bytes do not depend on who did what.

examples:
  python -m data_pipeline prepare output=corpora/demo
  python -m data_pipeline prepare data=slimpajama source=/data/SlimPajama-627B tokenizer=file \\
      tokenizer.path=20B_tokenizer.json output=corpora/slimpajama workers=32
  python -m data_pipeline prepare data=datasets source=datasets:roneneldan/TinyStories output=corpora/stories
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code (docs/configuration.md). `verify` that finds damage ends with 1."""
    options = parse_arguments(_parser(), arguments)

    def run() -> int:
        refuse_undecodable(arguments)
        return options.run(options)

    return exit_code(run, (MachineError, OSError), "interrupted; run the same command again to go on", (DataError,))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline", description="Prepare, look into and check corpora."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    prepare = commands.add_parser(
        "prepare",
        help="tokenize text into a corpus folder",
        description=PREPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prepare.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, see above")
    prepare.set_defaults(run=_prepare)
    inspect = commands.add_parser("inspect", help="statistics of a corpus and a decoded sample of it")
    inspect.add_argument("directory", type=_folder, help="corpus folder")
    inspect.add_argument(
        "--sample", type=int, metavar="I", help="show sample I of a run: where it comes from, its text"
    )
    inspect.add_argument(
        "--samples",
        metavar="FIRST:COUNT",
        help="the same of COUNT samples from FIRST on, such as those of a step that events.jsonl names",
    )
    inspect.add_argument(
        "--run",
        type=_folder,
        metavar="RUN",
        dest="run_directory",
        help="folder of the run, whose config.yaml has its order of samples; instead of the options below",
    )
    inspect.add_argument("--split", help="split of the sample (default: train)")
    inspect.add_argument("--sequence-length", type=int, metavar="S", help="of the run (default: 256)")
    inspect.add_argument("--seed", type=int, help="of the run's data order (default: 0)")
    inspect.add_argument(
        "--weight", action="append", metavar="SOURCE=W", help="mixture weight of the run (repeat for each)"
    )
    inspect.add_argument("--window-shards", type=int, metavar="W", help="corpus.window_shards of the run")
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser("verify", help="check every file of a corpus against its manifest")
    verify.add_argument("directory", type=_folder, help="corpus folder")
    verify.add_argument("--workers", type=int, default=1, metavar="N", help="shards checked at a time (default: 1)")
    verify.set_defaults(run=_verify)
    merge = commands.add_parser("merge", help="one corpus of several, without rewriting a shard")
    merge.add_argument("directories", type=_folder, nargs="+", metavar="DIRECTORY", help="corpus folders")
    merge.add_argument("--output", type=_folder, required=True, metavar="DIR", help="folder of the new corpus")
    merge.set_defaults(run=_merge)
    split = commands.add_parser("split", help="a part of a corpus, or several, without rewriting a shard")
    split.add_argument("directory", type=_folder, help="corpus folder")
    split.add_argument(
        "--output", type=_folder, required=True, metavar="DIR", help="new corpus; with --parts DIR-00000 ..."
    )
    split.add_argument("--split", action="append", default=[], metavar="SPLIT", help="only this one (repeat for more)")
    split.add_argument("--source", action="append", default=[], metavar="LABEL", help="only this one (repeat for more)")
    split.add_argument("--parts", type=int, default=1, metavar="N", help="deal the shards of each source to N corpora")
    split.set_defaults(run=_split)
    for command in (merge, split):
        command.add_argument(
            "--link",
            choices=("hard", "symbolic", "copy"),
            default="hard",
            help="how the new folder gets the shards' files: second names of the same files (default), links, copies",
        )
    return parser


def _folder(text: str) -> Path:
    # A shell leaves a ~ behind the = of an option as it is.
    return Path(text).expanduser()


def _window(text: str) -> tuple[int, int]:
    first, _, count = text.partition(":")
    try:
        return int(first), int(count)
    except ValueError:
        raise ConfigError([f"--samples: needs FIRST:COUNT with two whole numbers ({text})"]) from None


def _prepare(options: argparse.Namespace) -> int:
    from conf import compose
    from data_pipeline.preparing.config import PrepareConfig
    from data_pipeline.preparing.prepare import prepare

    with lasting_output():
        prepare(compose(PrepareConfig, "prepare", options.overrides))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from data_pipeline.corpus.corpus import Corpus
    from data_pipeline.corpus.inspection import show_corpus
    from data_pipeline.reading.inspection import show_samples
    from data_pipeline.reading.run_order import open_order
    from data_pipeline.reading.stream import Lanes

    keys = ("split", "sequence_length", "seed", "weight", "window_shards")
    given = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    names = ", ".join(f"--{key.replace('_', '-')}" for key in given)
    window = None if options.sample is None else (options.sample, 1)
    if window is None and options.samples is not None:
        window = _window(options.samples)
    if window is None:
        if given or options.run_directory is not None:
            raise ConfigError([f"{names or '--run'}: only --sample uses it; say which with --sample I"])
        show_corpus(options.directory)
        return 0
    if options.sample is not None and options.samples is not None:
        raise ConfigError(["--samples: --sample is another way to say which; leave out one of the two"])
    if given and options.run_directory is not None:
        raise ConfigError([f"{names}: --run {options.run_directory} says it already; leave out one of the two"])
    # The order is computed in 64 bits.
    if not 0 <= window[0] < 2**62:
        raise ConfigError([f"--sample: must be at least 0 and below 2^62 ({window[0]})"])
    if window[1] < 1:
        raise ConfigError([f"--samples: must be at least one sample ({window[0]}:{window[1]})"])
    try:
        if options.run_directory is not None:
            order, sequence_length, seed, global_batch_size, windows = _order_of_run(options.run_directory)
        else:
            weights = dict(map(_weight, given.get("weight", [])))
            order = OrderConfig(
                split=given.get("split", "train"), weights=weights or None, window_shards=options.window_shards
            )
            # No phase begins at a step.
            sequence_length, seed, global_batch_size = given.get("sequence_length", 256), given.get("seed", 0), 1
            windows = None
        corpus = Corpus.open(options.directory)
        lanes = None if windows is None else Lanes(global_batch_size, windows)
        stream = open_order(corpus, order, sequence_length, seed, global_batch_size, lanes=lanes)
        show_samples(stream, *window)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    return 0


def _weight(text: str) -> tuple[str, float]:
    source, _, value = text.rpartition("=")
    try:
        return source, float(value)
    except ValueError:
        raise ValueError(f"--weight: needs SOURCE=W with a number W ({text})") from None


def _order_of_run(directory: Path) -> tuple[OrderConfig, int, int, int, int | None]:
    """The order of a run that has started, its sequence length, seed and global batch size, and the windows of its
    lanes if it has any. Raises ConfigError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from conf import to_dataclass

    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError([f"--run: {path}: no such file; give the folder of a run that has started"])
    try:
        run = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError([f"--run: {path}: is no YAML ({' '.join(str(error).split())})"]) from None
    kinds = {"seed": int, "corpus": dict, "training": dict}
    if not isinstance(run, dict) or not all(fits(run.get(key), kind) for key, kind in kinds.items()):
        raise ConfigError([f"--run: {path}: is no configuration of a run, it lacks 'seed', 'corpus' or 'training'"])
    seed, corpus, training = (cast(Any, run[key]) for key in kinds)
    if corpus.get("directory") is None:
        raise ConfigError([f"--run: {path}: the run reads no prepared corpus (corpus.directory is null)"])
    keys = {field.name for field in fields(OrderConfig)}
    order = to_dataclass(OrderConfig, {key: value for key, value in corpus.items() if key in keys})
    windows = training.get("carry_windows") if training.get("carry_state", False) else None
    sequence_length, batch_size = training.get("sequence_length"), training.get("global_batch_size")
    if not (fits(windows, int | None) and all(fits(size, int) and size > 0 for size in (sequence_length, batch_size))):
        raise ConfigError([f"--run: {path}: is no configuration of a run, a size in 'training' is no number of tokens"])
    return order, sequence_length, seed, batch_size, windows


def _verify(options: argparse.Namespace) -> int:
    from data_pipeline.corpus.inspection import verify_corpus

    if problems := at_least("--workers", options.workers, 1):
        raise ConfigError(problems)
    problems = verify_corpus(options.directory, options.workers)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{options.directory}: every file is as it was written")
    return 1 if problems else 0


def _merge(options: argparse.Namespace) -> int:
    from data_pipeline.corpus.regroup import merge_corpora

    if len(options.directories) < 2:
        raise ConfigError([f"DIRECTORY: needs at least two corpora ({options.directories[0]})"])
    manifest = merge_corpora(options.directories, options.output, options.link)
    print(f"{options.output}: {len(manifest.shards)} shards of {len(options.directories)} corpora")
    return 0


def _split(options: argparse.Namespace) -> int:
    from data_pipeline.corpus.regroup import split_corpus

    if problems := at_least("--parts", options.parts, 1):
        raise ConfigError(problems)
    selection = (options.split, options.source, options.parts, options.link)
    for folder, manifest in split_corpus(options.directory, options.output, *selection):
        print(f"{folder}: {len(manifest.shards)} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
