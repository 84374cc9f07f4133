"""`train.py`: a preset and any field of `TrainConfig` as an option; trains, and says how to go on."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from davae_jax.cli.base import INTERRUPTED, exit_with, parse_options, run_cli
from davae_jax.regularizers import check_known, load_plugin, options_type
from davae_jax.training.config import TrainConfig
from davae_jax.training.presets import PRESETS
from davae_jax.utils.errors import InputError


def parse_train(argv: Sequence[str]) -> tuple[str, TrainConfig] | None:
    """(preset's name, config), or None where only the help was asked for. Without a preset's name it is the demo.

    Plugins are imported first, so that what they register has options like the rest.

    Raises:
      InputError: an option that is not known, or a value that cannot be (exit code 2).
    """
    argv = list(argv)
    preset = argv.pop(0) if argv and argv[0] in PRESETS else "demo"
    description, default = PRESETS[preset]
    command, default = with_plugins(argv, default)
    config = parse_options(
        command, argv, f"train.py {preset}", default=default, description=describe(preset, description)
    )
    return None if config is None else (preset, TrainConfig(**fields_of(config)))


def with_plugins(argv: Sequence[str], default: TrainConfig) -> tuple[type, TrainConfig]:
    """Imports the plugins of a command line. Returns `TrainConfig` as tyro is to read it, with the options of all that
    is registered by now, and the default as one of this type."""
    for plugin in plugins_in(argv):
        load_plugin(plugin)
    for arg in argv:
        if named := re.match(r"--regularizers\.([^.=]+)", arg):
            check_known(named[1].replace("-", "_"), option=arg.partition("=")[0])
    cls = config_type()
    default = cls(**fields_of(default) | {"regularizers": options_type()()})
    return Annotated[cls, tyro.conf.arg(name="", prefix_name=False)], default


def config_type() -> type[TrainConfig]:
    plugins = Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]
    fields = [
        ("regularizers", options_type(), dataclasses.field(default_factory=options_type())),
        ("plugin", plugins, dataclasses.field(default=())),
    ]
    said = {"__doc__": TrainConfig.__doc__}
    return dataclasses.make_dataclass("TrainConfig", fields, bases=(TrainConfig,), frozen=True, namespace=said)


def fields_of(config: TrainConfig) -> dict:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def plugins_in(argv: Sequence[str]) -> Iterator[Path]:
    """The files that --plugin names."""
    for arg, following in zip(argv, [*argv[1:], ""]):
        if arg == "--plugin":
            if not following or following.startswith("--"):
                raise InputError("--plugin: give a Python file", exit_code=2)
            yield Path(following)
        elif arg.startswith("--plugin="):
            yield Path(arg.partition("=")[2])


def describe(preset: str, description: str) -> str:
    others = ", ".join(f"{name} ({text.rstrip('.')})" for name, (text, _) in PRESETS.items() if name != preset)
    return f"Trains a DAVAE. Preset {preset}: {description} Other presets, as the first word: {others}."


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `train.py`. Returns the exit code: 0, 2 for bad arguments, 130 if interrupted, 1 for a failure."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = [arg for arg in argv if arg != "--debug"]  # on an error, prints the traceback as well
    received_signals: list[int] = []

    def interrupt(number, frame):
        received_signals.append(number)
        raise KeyboardInterrupt

    def work() -> int:
        from davae_jax.parallel.multihost import explain_lost_process

        with explain_lost_process():
            try:
                return train_from_command_line(options)
            except Exception:
                if received_signals:  # a library turned the interrupt into an error of its own
                    raise KeyboardInterrupt from None
                raise

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return run_cli(work, "train.py", debug="--debug" in argv)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train_from_command_line(argv: Sequence[str]) -> int:
    """Parses the options, trains, and prints what to do next. Returns the exit code."""
    if (parsed := parse_train(argv)) is None:
        return 0
    preset, config = parsed
    config = dataclasses.replace(config, run_dir=config.run_dir or Path("runs") / preset)

    from davae_jax.parallel import multihost
    from davae_jax.training.loop import train

    multihost.connect(config.distributed)
    result = train(config)
    if result.interrupted:
        multihost.disconnect()
        if multihost.is_process_zero():
            print(f"interrupted after step {result.step}; to go on: {resume_command(argv)}", file=sys.stderr)
        return INTERRUPTED
    if multihost.is_process_zero():
        run = result.run
        print(f"{run.checkpoints.last}: complete")
        davae = _program("davae", str(Path(sys.executable).with_name("davae")))
        print(f"next: {shlex.join([davae, 'generate', '--model', str(run.folder), run.corpus.example])}")
    return 0


def resume_command(argv: Sequence[str]) -> str:
    """Returns the command line that goes on with an interrupted run."""
    return shlex.join([_program("python", sys.executable), sys.argv[0], *argv])


def _program(name: str, path: str) -> str:
    """Returns how this environment's program is called: by its path where its name means nothing or another program."""
    return name if shutil.which(name) == path or not Path(path).exists() else path


if __name__ == "__main__":
    exit_with(main)
