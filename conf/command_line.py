"""How a command ends: its exit code, and a message where a user can do something about it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from conf.problems import ConfigError, undecodable


def refuse_undecodable(arguments: Sequence[str] | None) -> None:
    """Raise ConfigError for arguments that are no UTF-8; None: those of this process."""
    if problems := undecodable(sys.argv[1:] if arguments is None else arguments):
        raise ConfigError(problems)


def exit_code(command: Callable[[], int], failures: tuple[type[Exception], ...], interrupted: str) -> int:
    """Run `command` and return its exit code.

    2 for a wrong configuration, 1 for one of `failures` and for an interrupt (`interrupted` is what to say then); the
    message goes to stderr. 0 when the reader of the output (head, less) has seen enough. Other exceptions pass.
    """
    try:
        return command()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except failures as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 1
