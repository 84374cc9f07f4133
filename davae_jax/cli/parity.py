"""`davae parity`: PyTorch and JAX compared module by module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from davae_jax.cli.base import Command
from davae_jax.parity.compare import Dtype, compare, format_report


@dataclass(kw_only=True)
class Parity(Command):
    """Runs PyTorch and JAX side by side and says which module differs first; exit code 1 if one does."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Published folder, converted checkpoint or Hugging Face repo id: the weights of both sides."""

    against: str | None = None
    """Take PyTorch's weights from here instead: the folder that SRC was converted from."""

    dtype: Dtype = "float32"
    """JAX's number format; PyTorch's is float32. bfloat16 is allowed to differ more."""

    batch_size: int = 2
    """Rows of the random inputs."""

    length: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 48, or all positions)")
    ] = None
    """Tokens of the longest row."""

    seed: int = 0
    """Of the random inputs."""

    gradients: bool = True
    """Compare every tensor's gradient: half of the time, and a temporary file (in TMPDIR) as large as the weights."""

    def run(self) -> int:
        report = compare(
            self.src,
            against=self.against,
            dtype=self.dtype,
            batch_size=self.batch_size,
            length=self.length,
            seed=self.seed,
            gradients=self.gradients,
        )
        print(format_report(report))
        return 0 if report.ok else 1
