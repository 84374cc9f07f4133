"""The `davae` program: selects a command and runs it."""

from __future__ import annotations

from davae_jax.utils.signals import importing

with importing("davae"):
    import importlib.metadata
    import sys
    from collections.abc import Callable, Sequence

    from davae_jax.cli.base import Command, exit_with, run_cli, run_command
    from davae_jax.utils.errors import InputError
    from davae_jax.utils.huge_pages import restart_with_huge_pages


def _command(module: str, name: str) -> Callable[[], type[Command]]:
    """Returns a function that imports a command's class: `davae --help` should not wait for all of them."""

    def load() -> type[Command]:
        return getattr(importlib.import_module(f"davae_jax.cli.{module}"), name)

    return load


# Name → (one line for the help text, how to import the class).
COMMANDS: dict[str, tuple[str, Callable[[], type[Command]]]] = {
    "generate": ("vary texts: encode, sample a latent, generate", _command("text", "Generate")),
    "reconstruct": ("encode texts to their posterior mean and decode it", _command("text", "Reconstruct")),
    "sample": ("sample texts from the prior", _command("text", "Sample")),
    "interpolate": ("interpolate between two texts", _command("text", "Interpolate")),
    "analogy": ("complete an analogy: A is to B as C is to …", _command("text", "Analogy")),
    "attribute": ("strengthen or weaken an attribute that examples show", _command("latent", "Attribute")),
    "neighbours": ("sample texts around a text", _command("latent", "Neighbours")),
    "combine": ("add and subtract texts in the latent space", _command("latent", "Combine")),
    "encode": ("encode texts to a file of latents, .npz or Parquet", _command("latent_files", "Encode")),
    "decode": ("decode the latents of a file", _command("latent_files", "Decode")),
    "traverse": ("decode latents along a dimension or a direction", _command("latent_files", "Traverse")),
    "evaluate": ("evaluate a model: metrics and an HTML report", _command("evaluate", "Evaluate")),
    "compare": ("train several settings over several seeds and compare them", _command("compare", "Compare")),
    "plan": (
        "estimate memory, compute and communication of a training run",
        _command("plan", "PlanCommand"),
    ),
    "prepare": ("tokenize texts into shards for training", _command("prepare", "Prepare")),
    "check": ("tell what folders are and whether their files are whole", _command("check", "Check")),
    "convert": ("convert a published PyTorch checkpoint to davae-jax", _command("convert", "Convert")),
    "export": ("write a checkpoint in the published PyTorch layout", _command("export", "Export")),
    "parity": ("compare PyTorch and JAX on a checkpoint, module by module", _command("parity", "Parity")),
    "warm-start": ("create a model from a pretrained BERT and/or Transformer-XL", _command("warm_start", "WarmStart")),
}
TRAIN = "train"  # the program that train.py is as well
SUMMARIES = {TRAIN: "train a model, or resume its training"} | {name: line for name, (line, _) in COMMANDS.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `davae`. Returns the exit code: 0 on success, 2 for bad arguments, 1 for a failure."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == [TRAIN]:  # handles signals itself, and connects processes before it compiles
        with importing(f"davae {TRAIN}"):
            from davae_jax.cli.train import main as train
        return train(argv[1:], f"davae {TRAIN}")
    if argv and argv[0] in COMMANDS:
        return run_command(COMMANDS[argv[0]][1], argv[1:], f"davae {argv[0]}")
    return run_cli(lambda: _without_command(argv), "davae")


def _without_command(argv: list[str]) -> None:
    """Handles a command line that does not begin with a command."""
    if argv and argv[0] in ("-h", "--help"):
        print(_usage())
    elif argv and argv[0] == "--version":
        print(importlib.metadata.version("davae-jax"))
    else:
        problem = f"unknown command {argv[0]!r}" if argv else "no command given"
        raise InputError(f"{problem}; available: {', '.join(SUMMARIES)} (davae --help)", exit_code=2)


def script() -> None:
    """Runs `davae` and ends the process: the entry point of the installed program."""
    if sys.argv[1:2] == [TRAIN]:
        restart_with_huge_pages()
    exit_with(main)


def _usage() -> str:
    width = max(map(len, SUMMARIES)) + 2
    lines = [f"  {name:{width}}{summary}" for name, summary in SUMMARIES.items()]
    return "\n".join(["usage: davae COMMAND [OPTIONS]   (davae COMMAND --help)", "", *lines])
