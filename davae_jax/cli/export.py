"""`davae export`: a davae-jax checkpoint in the published PyTorch layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from davae_jax.checkpoints.to_torch import Format, export
from davae_jax.cli.base import Command


@dataclass(kw_only=True)
class Export(Command):
    """A davae-jax checkpoint → the published PyTorch layout, which the published program loads."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Converted or trained checkpoint."""

    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder to make; it appears when it is complete."""

    dtype: Literal["float16", "float32"] = "float16"
    """The file's number format; the published one is float16."""

    format: Format = "bin"
    """pytorch_model.bin (needs PyTorch), model.safetensors, or both."""

    overwrite: bool = False
    """Replace what stands at DST."""

    def run(self) -> None:
        export(self.src, self.dst, dtype=self.dtype, format=self.format, overwrite=self.overwrite)
        print(f"wrote {self.dst}")
