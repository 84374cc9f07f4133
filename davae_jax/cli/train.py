"""`train.py`: parses a preset and every field of `TrainConfig` as an option, trains, and prints the next command."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from davae_jax.cli.base import exit_with, going_on_without_reader, parse_options, run_cli
from davae_jax.regularizers import check_registered, config_with_plugins, load_installed, load_plugin
from davae_jax.training.config import TrainConfig
from davae_jax.training.presets import PRESETS
from davae_jax.utils.compile_cache import disable_compile_cache, use_compile_cache
from davae_jax.utils.errors import ConfigError, InputError, OptionError
from davae_jax.utils.progress import end_progress_lines
from davae_jax.utils.signals import INTERRUPTED, interrupt_on_signals

NO_CACHE = "--no-compile-cache"


def parse_train(argv: Sequence[str]) -> tuple[str, TrainConfig] | None:
    """Parses the options of train.py. The first word may be a preset; the default is the demo.

    Returns:
      The preset's name and the settings, or None if the help text was requested.

    Raises:
      ParseError, OptionError: an option is unknown, cannot be read, or does not allow its value.
      InputError: there is no such preset.
    """
    preset, argv = split_preset(argv, "demo")
    description, settings = PRESETS[preset]
    with naming_model_options():
        config = parse_options(
            TrainConfig,
            argv,
            f"train.py {preset}",
            default=add_plugin_options(argv, settings),
            description=_describe(preset, description),
        )
    return None if config is None else (preset, config)


def split_preset(argv: Sequence[str], default: str) -> tuple[str, list[str]]:
    """Returns the preset that the first word names, or the default, and the remaining words.

    Raises:
      InputError: the first word is neither a preset nor an option (exit code 2).
    """
    if not argv or argv[0].startswith("-"):
        return default, list(argv)
    if argv[0] not in PRESETS:
        raise InputError(f"no preset {argv[0]!r}; available: {', '.join(PRESETS)}", exit_code=2)
    return argv[0], list(argv[1:])


def add_plugin_options(argv: Sequence[str], default: TrainConfig) -> TrainConfig:
    """Imports the plugins of a command line and those of installed packages.

    Returns:
      The same settings with a field for each plugin's regularizer in `regularizers`. As the default of `tyro.cli`, it
      adds their options to the command line.
    """
    load_installed()
    for path in _plugin_paths(argv):
        load_plugin(path)
    for arg in argv:
        if match := re.match(r"--regularizers\.([^.=]+)", arg):
            check_registered(match[1].replace("-", "_"), option=arg.partition("=")[0])
    given = default.regularizers
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    return dataclasses.replace(default, regularizers=config_with_plugins()(**values))


@contextlib.contextmanager
def naming_model_options() -> Iterator[None]:
    """Names the option --model.… in errors about a field of the model's config."""
    try:
        yield
    except ConfigError as e:
        field = f"{e.section}.{e.field}" if e.section else e.field
        raise OptionError(f"--model.{field.replace('_', '-')}", e.reason) from None


def _plugin_paths(argv: Sequence[str]) -> Iterator[Path]:
    """Yields the files that --plugin names."""
    for arg, following in zip(argv, [*argv[1:], ""]):
        if arg == "--plugin":
            if not following or following.startswith("--"):
                raise OptionError("--plugin", "must be a Python file")
            yield Path(following)
        elif arg.startswith("--plugin="):
            yield Path(arg.partition("=")[2])


def _describe(preset: str, description: str) -> str:
    others = ", ".join(f"{name} ({text.rstrip('.')})" for name, (text, _) in PRESETS.items() if name != preset)
    return (
        f"Trains a DAVAE. Preset {preset}: {description} Other presets, as the first word: {others}. "
        f"As for every command, --debug prints the traceback of an error as well, and {NO_CACHE} keeps no compiled "
        "programs in the user's cache folder."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs train.py. Returns the exit code: 0, 2 for bad arguments, 130 if interrupted, 1 for a failure."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = [arg for arg in argv if arg not in ("--debug", NO_CACHE)]  # of the program, not of the training

    def work() -> int:
        with interrupt_on_signals(), going_on_without_reader():
            if (parsed := parse_train(options)) is None:
                return 0
            from davae_jax.parallel.multihost import explain_lost_process  # imports JAX, which --help does not need

            with explain_lost_process():
                return train_from_command_line(*parsed, options, compile_cache=NO_CACHE not in argv)

    return run_cli(work, "train.py", debug="--debug" in argv)


def train_from_command_line(
    preset: str, config: TrainConfig, argv: Sequence[str], *, compile_cache: bool = True
) -> int:
    """Trains, and prints what to do next. Returns the exit code. argv: the options, for the command that resumes."""
    from jax import distributed

    from davae_jax.parallel import multihost
    from davae_jax.training.initial_state import check_model_options
    from davae_jax.training.loop import train

    config = dataclasses.replace(config, run_dir=config.run_dir or Path("runs") / preset)
    check_model_options(config, given_model_fields(argv))
    if waiting := multihost.describe_waiting(config.distributed):
        print(waiting, flush=True)
    multihost.connect(config.distributed)
    if distributed.is_initialized() and not multihost.is_process_zero():
        end_progress_lines()
    # The processes of a run compile for GPUs together: one that loaded its program would leave the others waiting.
    use_compile_cache() if compile_cache and not multihost.compiles_together() else disable_compile_cache()
    result = train(config)
    if result.interrupted:
        multihost.disconnect()
        if multihost.is_process_zero():
            print(f"interrupted after step {result.step}; to resume: {resume_command(argv)}", file=sys.stderr)
        return INTERRUPTED
    if multihost.is_process_zero():
        run = result.run
        print(f"{run.checkpoints.last}: complete")
        print(f"next: {generate_command(run.folder, run.corpus.example)}")
    return 0


def given_model_fields(argv: Sequence[str]) -> set[str]:
    """Returns the fields of the model's config that options set, such as "decoder.num_layers"."""
    found = (re.match(r"--model\.([^=]+)", arg) for arg in argv)
    return {match[1].replace("-", "_") for match in found if match}


def generate_command(folder: Path, text: str) -> str:
    """Returns the command line that generates from a text with a run's model. Either may begin with a dash."""
    model = [f"--model={folder}"] if str(folder).startswith("-") else ["--model", str(folder)]
    texts = ["--", text] if text.startswith("-") else [text]
    return shlex.join([_program("davae", str(Path(sys.executable).with_name("davae"))), "generate", *model, *texts])


def resume_command(argv: Sequence[str]) -> str:
    """Returns the command line that resumes an interrupted run."""
    return shlex.join([_program("python", sys.executable), sys.argv[0], *argv])


def _program(name: str, path: str) -> str:
    """Returns how to call a program of this environment: by its path if its name means nothing or another program."""
    return name if shutil.which(name) == path or not Path(path).exists() else path


if __name__ == "__main__":
    exit_with(main)
