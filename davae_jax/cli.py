"""The `davae` command: finds the subcommand, parses its options with tyro, and turns every error into one line."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from davae_jax.errors import InputError


@dataclasses.dataclass(kw_only=True)
class Command:
    """What every command has. A subclass declares its options as fields and does its work in `run`."""

    debug: bool = False
    """On an error, print the traceback as well."""

    def run(self) -> int | None:
        """Does the work; a returned number is the exit code."""
        raise NotImplementedError


def _text_command(name: str) -> Callable[[], type[Command]]:
    def load():
        from davae_jax import commands

        return getattr(commands, name)

    return load


def _converter_command(module: str) -> Callable[[], type[Command]]:
    def load():
        from davae_jax.checkpoint import converter

        return converter(module).Main

    return load


# Loaded when used: `davae --help` should not wait for JAX.
COMMANDS: dict[str, tuple[str, Callable[[], type[Command]]]] = {
    "generate": ("variations of texts: encode, draw a latent, generate", _text_command("Generate")),
    "reconstruct": ("texts through their posterior mean and back", _text_command("Reconstruct")),
    "sample": ("texts from the prior", _text_command("Sample")),
    "interpolate": ("texts on the way from one text to another", _text_command("Interpolate")),
    "analogy": ("what is to C as B is to A", _text_command("Analogy")),
    "convert": ("published PyTorch checkpoint → davae-jax", _converter_command("from_torch")),
    "export": ("davae-jax checkpoint → published PyTorch layout", _converter_command("to_torch")),
    "parity": ("compare PyTorch and JAX on a checkpoint, module by module", _converter_command("parity")),
    "warm-start": ("a new model from a BERT and/or a Transformer-XL checkpoint", _converter_command("warm_start")),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `davae`. Returns the exit code: 0, 2 for bad arguments, 1 for a failure."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv and argv[0] == "--version":
        print(importlib.metadata.version("davae-jax"))
        return 0
    if not argv or argv[0] not in COMMANDS:
        what = f"unknown command {argv[0]!r}" if argv else "no command given"
        print(f"davae: error: {what}; known: {', '.join(COMMANDS)} (davae --help)", file=sys.stderr)
        return 2
    _, load = COMMANDS[argv[0]]
    return run(load, argv[1:], f"davae {argv[0]}")


def run(load: Callable[[], type[Command]], argv: Sequence[str] | None, prog: str) -> int:
    """Parses and runs one command; returns its exit code."""
    debug = "--debug" in (argv := list(sys.argv[1:] if argv is None else argv))

    def failed(message: str, code: int) -> int:
        if debug:
            traceback.print_exc()
        print(f"{prog}: error: {message}", file=sys.stderr)
        return code

    def show(message, category, filename, lineno, file=None, line=None):
        print(f"{prog}: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.simplefilter("always", UserWarning)
        try:
            return parse(load(), argv, prog).run() or 0
        except InputError as e:
            return failed(str(e), e.exit_code)
        except KeyboardInterrupt:
            print(f"{prog}: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # `davae … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as e:
            return failed(f"{e.filename}: {e.strerror}" if e.filename else str(e), 1)
        except Exception as e:
            first = (str(e).strip().splitlines() or [""])[0]
            return failed(f"{type(e).__name__}: {first} (--debug shows where)", 1)


def parse(command: type[Command], argv: Sequence[str], prog: str) -> Any:
    """The command with its options. tyro's framed message becomes one line; it exits with 2 as tyro does."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(command, args=list(argv), prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as e:
        if e.code:
            lines = [re.sub(r"[╭╮╰╯│─]+", " ", line).strip() for line in message.getvalue().splitlines()[1:]]
            said = lines[: lines.index("")] if "" in lines else lines
            raise InputError(f"{' '.join(' '.join(said).split())} ({prog} --help)", exit_code=2) from None
        raise


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{what}" for name, (what, _) in COMMANDS.items()]
    return "\n".join(["usage: davae COMMAND [OPTIONS]   (davae COMMAND --help)", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
