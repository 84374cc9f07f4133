"""`davae parity`: compares PyTorch and JAX module by module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from davae_jax.cli.base import Command, option_hint


@dataclass(kw_only=True)
class Parity(Command):
    """Runs PyTorch and JAX on the same inputs and reports the first module that differs; exit code 1 if one does."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Weights of both sides: published folder, converted checkpoint or Hugging Face repo id."""

    against: str | None = None
    """Weights of the PyTorch side, if not SRC: the folder that SRC was converted from."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of JAX; PyTorch computes in float32. The tolerance is larger for bfloat16."""

    batch_size: int = 2
    """Number of rows of the random inputs."""

    length: Annotated[int | None, option_hint("INT", "48, or all positions")] = None
    """Number of tokens of the longest row."""

    seed: int = 0
    """Random seed of the inputs."""

    gradients: bool = True
    """Also compare the gradients of all weights. This takes half of the time, and disk space for them in TMPDIR."""

    def run(self) -> int:
        from davae_jax.parity.compare import compare, format_report

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
