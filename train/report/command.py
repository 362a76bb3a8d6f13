"""What `python -m train.report` does: a run's picture, or the page and the picture that compare runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from conf.passwords import without_passwords
from conf.problems import undecodable
from train.report import comparison_page, comparison_picture
from train.report.run_picture import draw_report
from train.report.runs import read_runs

HELP = """\
Draw a run's report:  python -m train.report RUN_DIRECTORY
Writes RUN_DIRECTORY/report.png: losses, learning rate, gradient norm, throughput and the stability of every layer.

Compare runs:  python -m train.report RUN_DIRECTORY RUN_DIRECTORY ...
Writes comparison.html in the current folder, a page that needs no other file: curves of up to 20 runs over steps,
tokens and training FLOPs; losses, evaluations, stability and speed as tables; what differs in their configurations.
Writes comparison.png too, the curves over the tokens that each run has read, in one picture.

  --output FILE    write the page there instead (FILE.html), or the picture (any other FILE); also of one run
"""


def main(arguments: Sequence[str]) -> int:
    """Draw; returns the exit code (docs/configuration.md): 2 also where a run has nothing to draw."""
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if problems := undecodable(arguments):
        print(f"train.report: {problems[0]}", file=sys.stderr)
        return 2
    runs, output, problem = _parsed(list(arguments))
    if problem:
        print(f"train.report: {problem}\n\n{HELP}", file=sys.stderr)
        return 2
    try:
        for path in _write([Path(run) for run in runs], output):
            print(path)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        print(without_passwords(f"train.report: {error}"), file=sys.stderr)
        return 1 if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else 2
    return 0


def _write(folders: list[Path], output: Path | None) -> list[Path]:
    is_page = output is not None and output.suffix.lower() in (".html", ".htm")
    if len(folders) == 1 and not is_page:
        return [draw_report(folders[0], output)]
    runs = read_runs(folders)
    if output is not None:
        return [(comparison_page.write if is_page else comparison_picture.draw)(runs, output)]
    # The picture first: it fails where no run has a step yet, and a page alone would look like success.
    picture = comparison_picture.draw(runs, Path(comparison_picture.FILE_NAME))
    return [comparison_page.write(runs, Path(comparison_page.FILE_NAME)), picture]


def _parsed(arguments: list[str]) -> tuple[list[str], Path | None, str]:
    """(runs, where to write, what is wrong or "")."""
    output = None
    if "--output" in arguments:
        place = arguments.index("--output")
        if len(arguments) == place + 1:
            return [], None, "--output: name the file to write"
        output = Path(arguments.pop(place + 1))
        del arguments[place]
    if unknown := [argument for argument in arguments if argument.startswith("-")]:
        return [], None, f"no such option: {' '.join(unknown)}"
    return arguments, output, "" if arguments else "name a run's directory"
