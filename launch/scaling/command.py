"""`python -m launch sweep`: its commands; of collect, fit and predict what they take, and what they print."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from conf.problems import local_folder, undecodable
from launch.sweep.command import RUN_COMMANDS, add_run_commands, run_run_command

# Each command imports what it needs: the help does without torch, scipy and matplotlib.

_COLUMNS = "docs/scaling_laws.md has the columns of a table."


def add_sweep_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `sweep` and its commands to those of `python -m launch`."""
    sweep = commands.add_parser(
        "sweep", help="many runs, and scaling laws of them: plan, submit, collect, fit, predict"
    )
    parts = sweep.add_subparsers(dest="sweep", required=True)
    add_run_commands(parts)

    collect = parts.add_parser("collect", help="gather the losses of runs in one table", epilog=_COLUMNS)
    text = "folders of sweeps and of runs, and tables to add to them"
    collect.add_argument("paths", nargs="+", metavar="PATH", help=text)
    text = "the table, a CSV file; of one sweep alone runs.csv in its folder where nothing is said"
    collect.add_argument("--output", metavar="FILE", help=text)
    text = "the held-out set whose last loss counts; needed where runs score several"
    collect.add_argument("--set", dest="held_out", metavar="NAME", help=text)

    text = "fit IsoFLOP curves and L(N, D) to a table of runs"
    fit = parts.add_parser("fit", help=text, epilog=_COLUMNS)
    text = "CSV files with columns family, parameters, tokens, flops, context, loss"
    fit.add_argument("paths", nargs="+", metavar="FILE", help=text)
    text = "folder that gets scaling.html (all figures and tables in one page), fit.json (for predict) and runs.csv"
    fit.add_argument("--output", required=True, metavar="DIR", help=text)
    text = "a column that the files call otherwise, such as loss=val_ce; may be given several times"
    fit.add_argument("--column", action="append", default=[], metavar="NAME=THEIRS", help=text)
    text = "resamples of the runs, for the 95 %% intervals (default: 200)"
    fit.add_argument("--resamples", type=_whole, default=200, metavar="N", help=text)
    text = "of starts and resamples; the same seed gives the same figures (default: 0)"
    fit.add_argument("--seed", type=_whole, default=0, metavar="N", help=text)

    text = "the best size and number of tokens for a budget, with 95 %% intervals"
    predict = parts.add_parser("predict", help=text)
    predict.add_argument("path", metavar="DIR", help="that `sweep fit` wrote")
    text = "training FLOPs to spend, such as 1e21; may be given several times"
    predict.add_argument("--flops", action="append", required=True, type=_flops, metavar="C", help=text)


def run_sweep_command(options: argparse.Namespace) -> int:
    """Run what `options` ask for; returns the exit code.

    Raises ValueError for what the user must change, OSError where the machine fails.
    """
    given = vars(options).values()
    texts = [text for value in given for text in (value if isinstance(value, list) else [value])]
    if problems := undecodable(text for text in texts if isinstance(text, str)):
        raise ValueError("\n".join(problems))
    if options.sweep in RUN_COMMANDS:
        return run_run_command(options)
    if options.sweep == "collect" and options.output is None:
        options.output = _output_of(options.paths)
    if options.sweep != "predict":
        _check_output(options.output, is_folder=options.sweep == "fit")
    if options.sweep == "collect":
        _collect(options)
    elif options.sweep == "fit":
        _fit(options)
    else:
        _predict(options)
    return 0


def _output_of(paths: list[str]) -> str:
    from launch.sweep.manifest import is_sweep

    if len(paths) > 1 or not is_sweep(Path(paths[0])):
        raise ValueError("--output: name the CSV file to write; only the table of one sweep has a place of its own")
    return str(Path(paths[0]) / "runs.csv")


def _collect(options: argparse.Namespace) -> None:
    from launch.scaling.collect import collect
    from launch.scaling.runs import as_csv

    table = collect([Path(path) for path in options.paths], options.held_out)
    output = Path(options.output)
    _write(output, as_csv(table.runs))
    for run in table.excluded:
        print(f"excluded: {run.run}: {run.excluded}")
    print(f"{output}: {len(table.used)} runs to fit, {len(table.excluded)} excluded")


def _fit(options: argparse.Namespace) -> None:
    from launch.scaling.compare import compare
    from launch.scaling.fit import FitSettings, fit_table
    from launch.scaling.runs import as_csv, read_runs
    from launch.scaling.summary import as_lines

    settings = FitSettings(options.resamples, options.seed)
    settings.validate()
    table = read_runs([Path(path) for path in options.paths], _columns(options.column))
    for note in table.notes:
        print(note)
    fits = fit_table(table, settings, tell=lambda text: print(text, flush=True))
    comparisons = compare(fits)

    from launch.scaling.page import as_html
    from launch.scaling.stored_fit import as_json

    folder = Path(options.output)
    _write(folder / "runs.csv", as_csv(table.runs))
    _write(folder / "fit.json", as_json([fit.model for fit in fits]))
    _write(folder / "scaling.html", as_html(table, fits, comparisons, settings))
    print("\n".join(["", *as_lines(table, fits, comparisons), "", str(folder / "scaling.html")]))


def _predict(options: argparse.Namespace) -> None:
    from launch.scaling.predict import as_lines
    from launch.scaling.stored_fit import read_fit

    models = read_fit(Path(options.path))
    print("\n\n".join("\n".join(as_lines(models, flops)) for flops in options.flops))


def _check_output(given: str, is_folder: bool) -> None:
    """Raises ValueError for a place that cannot be written to, before minutes are spent on what should go there."""
    path, problems = Path(given), local_folder("--output", given)
    if is_folder and path.exists() and not path.is_dir():
        problems.append(f"--output: {path} is a file; name a folder, which gets several files")
    if not is_folder and path.is_dir():
        problems.append(f"--output: {path} is a folder; name the CSV file to write")
    if problems:
        raise ValueError("\n".join(problems))


def _columns(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, theirs = text.partition("=")
        if not equals or not theirs:
            raise ValueError(f"--column {text}: write NAME=THEIRS, such as --column loss=val_loss")
        found[name] = theirs
    return found


def _write(path: Path, text: str) -> None:
    from train.run_directory import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no whole number")
    return int(text)


def _flops(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no positive number of FLOPs, such as 1e21")
    return value
