"""The command line of `train.py`: a preset, and any field of `TrainConfig` as an option."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro

from davae_jax.cli import parse
from davae_jax.train_config import PRESETS, TrainConfig


def parse_train(argv: Sequence[str]) -> tuple[str, TrainConfig] | None:
    """(preset's name, config), or None where only the help was asked for. Without a preset's name it is the demo.

    Raises:
      InputError: an option that is not known, or a value that cannot be (exit code 2).
    """
    argv = list(argv)
    preset = argv.pop(0) if argv and argv[0] in PRESETS else "demo"
    description, default = PRESETS[preset]
    command = Annotated[TrainConfig, tyro.conf.arg(name="", prefix_name=False)]
    config = parse(command, argv, f"train.py {preset}", default=default, description=describe(preset, description))
    return None if config is None else (preset, config)


def describe(preset: str, description: str) -> str:
    others = ", ".join(f"{name} ({text.rstrip('.')})" for name, (text, _) in PRESETS.items() if name != preset)
    return f"Trains a DAVAE. Preset {preset}: {description} Other presets, as the first word: {others}."
