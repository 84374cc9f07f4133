"""`davae convert`: converts a published PyTorch checkpoint to a folder of Orbax weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from davae_jax.cli.base import Command


@dataclass(kw_only=True)
class Convert(Command):
    """Converts a published PyTorch checkpoint to a folder of Orbax weights, which davae_jax.from_pretrained reads."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Folder with config.json and pytorch_model.bin or model.safetensors, or a Hugging Face repo id."""

    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder to create; it appears when it is complete."""

    overwrite: bool = False
    """Replace DST if it exists and contains a model and nothing else."""

    def run(self) -> None:
        from davae_jax.checkpoints.published.from_torch import convert

        convert(self.src, self.dst, overwrite=self.overwrite)
        print(f"wrote {self.dst}")
