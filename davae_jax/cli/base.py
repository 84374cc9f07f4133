"""The `davae` command: finds the subcommand, parses its options with tyro, and turns every error into one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from davae_jax.utils.errors import InputError

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended


@dataclasses.dataclass(kw_only=True)
class Command:
    """What every command has. A subclass declares its options as fields and does its work in `run_command`."""

    debug: bool = False
    """On an error, print the traceback as well."""

    @classmethod
    def parse(cls, argv: Sequence[str], prog: str) -> Command | None:
        """The command with its options; None where the help text was asked for. Raises as `parse_options`."""
        return parse_options(cls, argv, prog)

    def run(self) -> int | None:
        """Does the work; a returned number is the exit code."""
        raise NotImplementedError


def run_command(load: Callable[[], type[Command]], argv: Sequence[str] | None, prog: str) -> int:
    """Parses and runs one command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def work() -> int | None:
        command = load().parse(argv, prog)
        return command.run() if command else 0

    return run_cli(work, prog, debug="--debug" in argv)


def run_cli(work: Callable[[], int | None], prog: str, *, debug: bool = False) -> int:
    """Does the work and returns its exit code; an error becomes one line on standard error, a warning another."""

    def failed(message: str, code: int) -> int:
        if debug:
            traceback.print_exc()
        print(f"{prog}: error: {message}", file=sys.stderr)
        return code

    def show(message, category, filename, lineno, file=None, line=None):
        print(f"{prog}: warning: {message}", file=sys.stderr)

    with contextlib.suppress(AttributeError):  # where a caller put a stream of its own
        sys.stdout.reconfigure(encoding="utf-8")  # as JSON Lines are, whatever the locale
    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.simplefilter("always", UserWarning)
        try:
            code = work() or 0
            print(end="", flush=True)  # at its exit, Python would not report well that there is no room
            return code
        except InputError as e:
            return failed(str(e), e.exit_code)
        except KeyboardInterrupt:
            print(f"{prog}: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # `davae … | head`
            _stdout_is_broken()
            return 0
        except OSError as e:
            name = e.filename or ("standard output" if _stdout_is_broken() else None)
            return failed(f"{name}: {e.strerror}" if name else str(e), 1)
        except Exception as e:
            first = (str(e).strip().splitlines() or [""])[0]
            return failed(f"{type(e).__name__}: {first} (--debug shows where)", 1)


def exit_with(main: Callable[[], int]) -> None:
    """Runs a program's main function and ends the process with its exit code.

    After an error or an interrupt it ends at once, without Python's clean-up: threads of XLA that still compute would
    crash, and in a run of several processes JAX would wait for the others, which may wait for this one.
    """
    sys.unraisablehook = _unraisable
    code = main()
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _unraisable(found: Any) -> None:
    """An interrupt that came in upon a library's callback, which cannot raise, comes again a moment later. And where a
    checkpoint cannot be read, Orbax closes its event loop with other reads under way, and each of them would write a
    traceback after the one line that says what is the matter."""
    if isinstance(found.exc_value, KeyboardInterrupt):
        again = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        again.daemon = True
        again.start()
    elif not (isinstance(found.exc_value, RuntimeError) and "Event loop is closed" in str(found.exc_value)):
        sys.__unraisablehook__(found)


def _stdout_is_broken() -> bool:
    """Whether standard output takes nothing. What is unwritten goes nowhere then, or Python would try again at exit."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def parse_options(command: type, argv: Sequence[str], prog: str, **kwargs) -> Any:
    """The command with its options; None where all that was asked for is the help text, which is printed.

    What else is given goes to `tyro.cli`: `default`, `description`.

    Raises:
      InputError: tyro's framed message as one line.
    """
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(command, args=list(argv), prog=prog, config=(tyro.conf.FlagCreatePairsOff,), **kwargs)
    except SystemExit as e:
        if not e.code:
            return None
    raise InputError(f"{_one_line(message.getvalue())} ({prog} --help)", exit_code=2)


def _one_line(framed: str) -> str:
    """What a message of tyro's says: its first section, that on unknown options, and a rewording of Python's terms."""
    lines = [re.sub(r"[╭╮╰╯│─]+", " ", line).strip() for line in framed.splitlines()[1:]]
    groups = itertools.groupby(lines, key="".__eq__)  # a rule between two sections has become empty
    sections = [" ".join(" ".join(group).split()) for is_rule, group in groups if not is_rule]
    said = "; ".join(s for n, s in enumerate(sections) if n == 0 or s.startswith("Unrecognized options"))
    if bad := re.match(r"Error parsing (\S+): .*?('.*'|\".*\")", said):
        what = re.search(rf"Argument helptext: {re.escape(bad[1])} \[?(\S+)", " ".join(sections))
        return f"{bad[1]}: cannot read {bad[2]}" + (f" as {what[1]}" if what else "")
    return said
