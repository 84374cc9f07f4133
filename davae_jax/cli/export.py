"""`davae export`: writes a davae-jax checkpoint in the published PyTorch layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from davae_jax.cli.base import Command


@dataclass(kw_only=True)
class Export(Command):
    """Writes a davae-jax checkpoint in the published PyTorch layout, which the published program loads."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Converted or trained checkpoint."""

    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder to create; it appears when it is complete."""

    dtype: Literal["float16", "float32"] = "float16"
    """Number format of the weights; the published one is float16."""

    format: Literal["bin", "safetensors", "both"] = "bin"
    """File format: pytorch_model.bin (needs PyTorch), model.safetensors, or both."""

    overwrite: bool = False
    """Replace DST if it exists and contains a model and nothing else."""

    def run(self) -> None:
        from davae_jax.checkpoints.published.to_torch import export

        export(self.src, self.dst, dtype=self.dtype, format=self.format, overwrite=self.overwrite)
        print(f"wrote {self.dst}")
