"""What is wrong with configured values, in the words that every part of the project uses. Imports no package.

A validating function returns a list with one line for each problem: the key, what is wrong, the value in brackets, what
to change. The functions below return such lists, empty when the value is fine, so that callers add them up:

    problems = choice("corpus.packing", config.packing, PACKINGS) + at_least("corpus.workers", config.workers, 1)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from conf.passwords import without_passwords


class ConfigError(ValueError):
    """A configuration that the user must change; `problems` holds one line for each, with its key path."""

    def __init__(self, problems: Sequence[str]):
        self.problems = [without_passwords(problem) for problem in problems]
        count = len(self.problems)
        heading = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(f"{heading} in the configuration:\n" + "\n".join(f"  - {line}" for line in self.problems))


def choice(key: str, value: object, choices: Iterable[object], noun: str = "choice") -> list[str]:
    """`value` is none of `choices`; `noun` names what is chosen."""
    choices = tuple(choices)
    if value in choices:
        return []
    return [f"{key}: no such {noun} ({value!r}); choose one of {', '.join(map(str, choices))}"]


def at_least(key: str, value: float | None, low: float) -> list[str]:
    """`value` is below `low`, or no number; None (null: not set) is fine."""
    if value is None or value >= low:
        return []
    return [f"{key}: must be at least {low} ({value})"]


def between(key: str, value: float, low: float, high: float, measure: str = "") -> list[str]:
    """`value` lies outside of `low`..`high`, both included; `measure`: what is counted, for the message."""
    if low <= value <= high:
        return []
    return [f"{key}: must be between {low} and {high}{' ' if measure else ''}{measure} ({value})"]


def positive(key: str, value: float) -> list[str]:
    """`value` is 0, negative or no number."""
    if value > 0:
        return []
    return [f"{key}: must be positive ({value})"]


def exactly_one(key: str, values: Mapping[str, object]) -> list[str]:
    """None or several of two values are set, where one must be; `values` maps their names to what they are."""
    if sum(value is not None for value in values.values()) == 1:
        return []
    if all(value is None for value in values.values()):
        return [f"{key}: none of {' and '.join(values)} is set; set one of them"]
    shown = " and ".join(f"{name} ({value})" for name, value in values.items())
    return [f"{key}: set exactly one of {shown}, the other to null"]


def local_folder(key: str, path: str) -> list[str]:
    """`path`, where something is written, would make a folder named `~` or `s3:`."""
    if path == "~" or path.startswith("~/"):
        return [f"{key}: write the home folder in full ({path})"]
    if "://" in path:
        return [f"{key}: must be a folder of this machine, not a URL ({path}); write to one, then copy it there"]
    return []


def other_format(file: object, found: object, known: int, key: str = "format_version") -> str:
    """The problem of a `file` whose format is not `known`; empty where it is."""
    if str(found) == str(known):
        return ""
    text = f"{file} has {key} {found}; this version of xlstm-pretrain reads {known}"
    return f"{text}; a later version wrote it: upgrade xlstm-pretrain" if is_later_format(found, known) else text


def is_later_format(found: object, known: int) -> bool:
    """Whether a file says that a later version of this program wrote it."""
    return str(found).isdecimal() and int(str(found)) > known


def undecodable(texts: Iterable[str]) -> list[str]:
    """`texts`, such as arguments of a command, that hold bytes which are no UTF-8: Python keeps those as surrogates,
    which no file, tokenizer or terminal takes."""
    problems = []
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            as_bytes = re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)
            shown = as_bytes.encode("utf-8", "backslashreplace").decode("utf-8")
            problems.append(f"{shown}: holds bytes that are no UTF-8; give the text, or name the file, in UTF-8")
    return problems


def suggestion(key: str, known: Sequence[str], likeness: float = 0.6) -> str:
    """What to append to a message about `key`: the name of `known` that it nearly is; empty when it resembles none.

    `likeness`: the least ratio of equal characters, 0 to 1.
    """
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=likeness)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""
