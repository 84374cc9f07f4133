"""The `davae` command."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence

from davae_jax.cli.base import Command, exit_with, run_cli, run_command
from davae_jax.utils.errors import InputError


def _command(module: str, name: str) -> Callable[[], type[Command]]:
    def load():
        return getattr(importlib.import_module(f"davae_jax.cli.{module}"), name)

    return load


# Loaded when used: `davae --help` should not wait for JAX.
COMMANDS: dict[str, tuple[str, Callable[[], type[Command]]]] = {
    "generate": ("variations of texts: encode, draw a latent, generate", _command("text", "Generate")),
    "reconstruct": ("texts through their posterior mean and back", _command("text", "Reconstruct")),
    "sample": ("texts from the prior", _command("text", "Sample")),
    "interpolate": ("texts on the way from one text to another", _command("text", "Interpolate")),
    "analogy": ("what is to C as B is to A", _command("text", "Analogy")),
    "attribute": ("texts with more or less of what examples show", _command("latent", "Attribute")),
    "neighbours": ("texts around a text", _command("latent", "Neighbours")),
    "combine": ("sums and differences of texts", _command("latent", "Combine")),
    "evaluate": ("what a model is worth: measures, and a report to look at", _command("evaluate", "Evaluate")),
    "compare": ("settings trained side by side, over several seeds", _command("compare", "Compare")),
    "plan": (
        "memory, work and traffic of a training run on machines that are not here",
        _command("plan", "PlanCommand"),
    ),
    "prepare": ("texts → tokenised shards to train on", _command("prepare", "Prepare")),
    "convert": ("published PyTorch checkpoint → davae-jax", _command("convert", "Convert")),
    "export": ("davae-jax checkpoint → published PyTorch layout", _command("export", "Export")),
    "parity": ("compare PyTorch and JAX on a checkpoint, module by module", _command("parity", "Parity")),
    "warm-start": ("a new model from a BERT and/or a Transformer-XL checkpoint", _command("warm_start", "WarmStart")),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `davae`. Returns the exit code: 0, 2 for bad arguments, 1 for a failure."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return run_command(COMMANDS[argv[0]][1], argv[1:], f"davae {argv[0]}")
    return run_cli(lambda: _without_command(argv), "davae")


def _without_command(argv: list[str]) -> None:
    if argv and argv[0] in ("-h", "--help"):
        print(_usage())
    elif argv and argv[0] == "--version":
        print(importlib.metadata.version("davae-jax"))
    else:
        what = f"unknown command {argv[0]!r}" if argv else "no command given"
        raise InputError(f"{what}; known: {', '.join(COMMANDS)} (davae --help)", exit_code=2)


def script() -> None:
    """The `davae` program."""
    exit_with(main)


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{what}" for name, (what, _) in COMMANDS.items()]
    return "\n".join(["usage: davae COMMAND [OPTIONS]   (davae COMMAND --help)", "", *lines])
