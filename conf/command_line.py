"""How a command ends: its exit code, and a message where a user can do something about it."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from conf.passwords import without_passwords
from conf.problems import ConfigError, undecodable


def refuse_undecodable(arguments: Sequence[str] | None) -> None:
    """Raise ConfigError for arguments that are no UTF-8; None: those of this process."""
    if problems := undecodable(sys.argv[1:] if arguments is None else arguments):
        raise ConfigError(problems)


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments as `parser` sorts them. It ends the process after its help, also where nobody reads that.

    A setting (key=value) that is typed as an option is answered with how it is typed.
    """
    try:
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            takes_settings = hasattr(options, "overrides") or hasattr(options, "settings")
            name = unknown[0].lstrip("-").partition("=")[0]
            hint = f"; settings are typed without dashes: {name}=VALUE" if takes_settings else ""
            parser.error(without_passwords(f"no such option: {' '.join(unknown)}{hint}"))
        return options
    finally:
        with _quiet_without_reader():
            if sys.stdout is not None:
                sys.stdout.flush()


def exit_code(
    command: Callable[[], int],
    failures: tuple[type[Exception], ...],
    interrupted: str,
    refusals: tuple[type[Exception], ...] = (),
) -> int:
    """Run `command` and return its exit code, by the one rule of all commands (docs/configuration.md).

    2 where the user must change the command or what it names: a ConfigError, or one of `refusals` that is none of
    `failures`. 1 where the work fails though the command is right: one of `failures`, and an interrupt (`interrupted`
    is what to say then). The message goes to stderr. 0 when the reader of the output (head, less) has seen enough.
    Other exceptions pass.
    """
    code = 0
    with _quiet_without_reader(), _interrupts_end_imports(interrupted):
        try:
            code = command()
            # What is still held would fail when the interpreter ends.
            if sys.stdout is not None:
                sys.stdout.flush()
        except ConfigError as error:
            code = 2
            print(error, file=sys.stderr)
        except BrokenPipeError:
            raise
        except failures as error:
            code = 1
            print(without_passwords(f"error: {error}"), file=sys.stderr)
        except refusals as error:
            code = 2
            print(without_passwords(f"error: {error}"), file=sys.stderr)
        except KeyboardInterrupt:
            code = 1
            print(interrupted, file=sys.stderr)
    return code


@contextlib.contextmanager
def _interrupts_end_imports(text: str) -> Iterator[None]:
    """An interrupt (Ctrl-C) while a module is imported ends the process at once, with 1 and `text`.

    There is nothing to clean up yet, and a KeyboardInterrupt would be lost in libraries that try imports out, or come
    out of them as another error. Elsewhere it is raised as ever.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        inner = frame
        while inner is not None:
            if inner.f_code.co_filename.startswith("<frozen importlib"):
                # print() may be what was interrupted.
                with contextlib.suppress(OSError):
                    os.write(2, f"{text}\n".encode())
                os._exit(1)
            inner = inner.f_back
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _quiet_without_reader() -> Iterator[None]:
    """Where a pipe has no reader any more, what is still to be said goes nowhere."""
    try:
        yield
    except BrokenPipeError:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except BrokenPipeError:
                with contextlib.suppress(io.UnsupportedOperation):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
