"""The command line of `train.py`: a preset, and any field of `TrainConfig` as an option."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from davae_jax.cli.base import parse_options
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
