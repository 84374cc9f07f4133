"""Shared by all programs: the base class of a command, parsing of options, and reporting of errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from davae_jax.cli.renamed import replace_renamed
from davae_jax.cli.streams import WithoutReader, going_on_without_reader, open_closed_streams, stdout_is_broken
from davae_jax.parallel.backend import backend_problem
from davae_jax.utils.compile_cache import disable_compile_cache, use_compile_cache
from davae_jax.utils.errors import InputError, OptionError, escape_controls, first_line, on_one_line
from davae_jax.utils.files import TEXT_ENCODING
from davae_jax.utils.progress import progress_lines
from davae_jax.utils.signals import INTERRUPTED, SIGNALS, interrupt_on_signals, repeat_interrupt


@dataclasses.dataclass(kw_only=True)
class Command:
    """The base class of every command. A subclass declares its options as fields and implements `run`."""

    is_filter: ClassVar[bool] = False
    """Whether the result is what the command prints: it then ends quietly when nobody reads on, as in `davae … | head`.
    Every other command goes on without its output."""

    debug: bool = False
    """On an error, print the traceback as well."""

    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that the next start need not compile them."""

    @classmethod
    def parse(cls, argv: Sequence[str], prog: str) -> Command | None:
        """Returns the command with its options, or None if the help text was requested. Raises as `parse_options`."""
        return parse_options(cls, argv, prog)

    def run(self) -> int | None:
        """Runs the command. Returns the exit code; None means 0."""
        raise NotImplementedError


def option_hint(metavar: str, default: str) -> Any:
    """Returns an annotation for an option whose default is None: how its value and its default appear in the help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


def join_repeated(argv: Sequence[str], options: Collection[str]) -> list[str]:
    """Returns a command line in which each of these options, which take any number of values, is given once.

    tyro would take the values of the last occurrence alone: "--input a --input b" becomes "--input a b".
    """
    end = argv.index("--") if "--" in argv else len(argv)
    argv, positional = argv[:end], list(argv[end:])
    names = [word.partition("=")[0].replace("_", "-") for word in argv]
    if all(names.count(option) < 2 for option in options):
        return [*argv, *positional]
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    current = None
    for word in argv:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") in options:
            current = values.setdefault(name.replace("_", "-"), [])
            current += [value] if equals else []
        elif current is not None and not re.match(r"-(-|[A-Za-z])", word):
            current.append(word)
        else:
            current = None
            rest.append(word)
    return rest + [word for name, words in values.items() for word in (name, *words)] + positional


def remove_options(argv: Sequence[str], options: Collection[str]) -> list[str]:
    """Returns a command line without these options and their values."""
    kept, removing = [], False
    for word in argv:
        if word.startswith("--"):
            removing = word.partition("=")[0].replace("_", "-") in options
        if not removing:
            kept.append(word)
    return kept


def options_of_many_values(command: type, prefix: str = "--") -> set[str]:
    """Returns the options of a dataclass and its sections that take any number of values in one occurrence."""
    options = set()
    for name, hint in get_type_hints(command, include_extras=True).items():
        base, *marks = (hint.__origin__, *hint.__metadata__) if get_origin(hint) is Annotated else (hint,)
        option = f"{prefix}{name.replace('_', '-')}"
        if dataclasses.is_dataclass(base):
            has_prefix = all(getattr(mark, "prefix_name", None) is not False for mark in marks)
            options |= options_of_many_values(base, f"{option}." if has_prefix else prefix)
        elif tyro.conf.UseAppendAction not in marks:
            types = (base, *get_args(base))  # perhaps a union with None
            if any(get_origin(kind) is tuple and Ellipsis in get_args(kind) for kind in types):
                options.add(option)
    return options


class ParseError(InputError):
    """The options cannot be parsed. The reason has already been printed on standard error."""

    def __init__(self, prog: str):
        super().__init__(f"the options cannot be parsed ({prog} --help)", exit_code=2)


def parse_options(command: type, argv: Sequence[str], prog: str, **tyro_options: Any) -> Any:
    """Parses a command line with tyro.

    Args:
      command: a dataclass whose fields are the options.
      prog: the program's name in messages. Its options that were renamed are accepted under their old names too.
      tyro_options: further arguments of `tyro.cli`: `default`, `description`.

    Returns:
      The dataclass with the options' values, or None if the help text was requested and has been printed.

    Raises:
      ParseError: an option is unknown, missing or cannot be read. tyro has printed a message that names it.
      InputError: the dataclass does not allow a value. tyro would print this error in a frame and exit.
      OptionError: an option's value is empty.
    """
    argv = replace_renamed(argv, prog)
    argv = join_repeated(argv, options_of_many_values(command))
    _check_words(argv)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            config = (tyro.conf.FlagCreatePairsOff,)
            return tyro.cli(command, args=argv, prog=prog, config=config, registry=_unwrap_help(), **tyro_options)
    except SystemExit as e:
        if not e.code:
            return None
        cause: BaseException | None = e
        while cause := cause.__context__:
            if isinstance(cause, InputError):
                raise cause from None
        # Words, which may come from a study, may contain control characters. tyro's own are colours.
        if (shown := [escape_controls(word) for word in argv]) != list(argv):
            parse_options(command, shown, prog, **tyro_options)  # raises the same error of words that can be shown
        sys.stderr.write(message.getvalue())
        raise ParseError(prog) from None


def _check_words(argv: Sequence[str]) -> None:
    """Raises InputError if an option's value is empty, as that of a shell's variable that is not set, or has a NUL.

    An empty path would be the working folder, and an empty name that of nothing. A study may contain a NUL, which no
    path and no program's arguments can.
    """
    if words := [word for word in argv if "\0" in word]:
        raise InputError(f"{words[0]}: contains a NUL character")
    options = argv[: argv.index("--")] if "--" in argv else argv
    for word, following in zip(options, [*options[1:], None]):
        name, equals, value = word.partition("=")
        if name.startswith("--") and (following if not equals else value) == "":
            raise OptionError(name, "must not be empty; is a variable of the shell not set?")


def _unwrap_help() -> ConstructorRegistry:
    """Returns a registry for `tyro.cli` that joins the lines of each option's help text.

    tyro keeps the line breaks of indented docstrings and wraps each line again, which makes the help ragged.
    """
    registry, is_delegating = ConstructorRegistry(), False

    @registry.struct_rule
    def unwrap(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal is_delegating
        if is_delegating or not dataclasses.is_dataclass(info.type):
            return None
        is_delegating = True  # the next call returns None, so that tyro's rule for dataclasses applies
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            is_delegating = False
        if not isinstance(spec, StructConstructorSpec):
            return spec
        fields = (dataclasses.replace(f, helptext=partial(_join_lines, f.helptext)) for f in spec.fields)
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


def _join_lines(helptext: str | Callable[[], str | None] | None) -> str | None:
    """Returns a help text, which tyro may compute only when it is needed, in one line."""
    text = helptext() if callable(helptext) else helptext
    return text and " ".join(text.split())


def run_command(load: Callable[[], type[Command]], argv: Sequence[str] | None, prog: str) -> int:
    """Parses and runs one command. Returns its exit code.

    Args:
      load: returns the command's class; its module is imported only now.
      argv: the words after the command's name; None takes the program's.
      prog: the program's name in messages.
    """
    argv = list(sys.argv[1:] if argv is None else argv)

    def work() -> int | None:
        cls = load()
        # An interrupt lets the command remove what it has not completed. SIGINT may be ignored, as of a shell's job.
        with (
            interrupt_on_signals([n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]),
            contextlib.nullcontext() if cls.is_filter else going_on_without_reader(),
        ):
            if (command := cls.parse(argv, prog)) is None:
                return 0
            use_compile_cache() if command.compile_cache else disable_compile_cache()
            return command.run()

    return run_cli(work, prog, debug="--debug" in argv)


def run_cli(work: Callable[[], int | None], prog: str, *, debug: bool = False) -> int:
    """Calls `work` and returns its exit code. An error or a warning becomes one line on standard error."""

    def say(message: str) -> None:
        print(f"{prog}: {on_one_line(message)}", file=WithoutReader(sys.stderr), flush=True)

    def report(message: str, code: int) -> int:
        if debug:
            traceback.print_exc()
        say(f"error: {message}")
        return code

    def show_warning(message, category, filename, lineno, file=None, line=None):
        if not (category is RuntimeWarning and "was never awaited" in str(message)):  # of a library that has failed
            say(f"warning: {message}")

    open_closed_streams()
    with contextlib.suppress(AttributeError):  # a caller may have replaced the stream by one of another type
        sys.stdout.reconfigure(**TEXT_ENCODING)  # JSON Lines are UTF-8 in every locale
    code = 0
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        warnings.simplefilter("always", UserWarning)
        try:
            with progress_lines(prog):
                code = work() or 0
            print(end="", flush=True)  # a full disk is noticed here, where it can be reported
            return code
        except ParseError as e:
            return e.exit_code
        except InputError as e:
            is_explained = e.__cause__ is None or isinstance(e.__cause__, (InputError, OSError))
            gone = "" if _has_working_folder() else " (the working directory no longer exists)"
            return report((None if is_explained else backend_problem(e)) or f"{e}{gone}", e.exit_code)
        except KeyboardInterrupt:
            say("interrupted")
            return INTERRUPTED
        except BrokenPipeError:  # `davae … | head`
            stdout_is_broken()
            return code
        except OSError as e:
            if isinstance(e, FileNotFoundError) and not _has_working_folder():
                return report("the working directory no longer exists", 1)
            name = e.filename or ("standard output" if stdout_is_broken() else None)
            return report(f"{name}: {e.strerror}" if name else str(e), 1)
        except ModuleNotFoundError as e:
            return report(backend_problem(e) or f"the Python package {e.name or e} is not installed", 1)
        except BaseException as e:  # a plugin's code may exit with 0 in the middle of the work, or raise anything
            return report(backend_problem(e) or f"{type(e).__name__}: {first_line(e)} (--debug shows where)", 1)


def exit_with(main: Callable[[], int]) -> None:
    """Runs a program's main function and ends the process with its exit code.

    After an error or an interrupt it ends at once, without Python's clean-up: threads of XLA that still compute would
    crash, and in a run of several processes JAX would wait for the others, which may wait for this one.
    """
    sys.unraisablehook = _report_unraisable
    code = main()
    if code:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _report_unraisable(unraisable: Any) -> None:
    """Handles exceptions that Python cannot raise (`sys.unraisablehook`).

    An interrupt is sent again. Errors in Orbax's coroutines are ignored: when a checkpoint cannot be read, Orbax closes
    its event loop while other reads are running, and each of them would print a traceback after the line that reports
    the error. So are errors of event loops that could not be made for want of open files, which has been reported.
    Everything else is reported as usual.
    """
    exception = unraisable.exc_value
    code = getattr(unraisable.object, "cr_code", None)
    is_of_orbax = code is not None and "orbax" in code.co_filename
    is_of_loop = getattr(unraisable.object, "__qualname__", "") == "BaseEventLoop.__del__"
    if isinstance(exception, KeyboardInterrupt):
        repeat_interrupt()
    elif not (
        is_of_orbax or is_of_loop or (isinstance(exception, RuntimeError) and "Event loop is closed" in str(exception))
    ):
        sys.__unraisablehook__(unraisable)


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True
