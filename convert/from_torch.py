"""Converts a published PyTorch checkpoint to a folder of Orbax weights, which `davae_jax.from_pretrained` reads.

    python -m convert.from_torch SRC DST

The same as `davae convert`.
"""

from davae_jax.utils.signals import importing

with importing("convert.from_torch"):
    from davae_jax.cli.base import exit_with, run_command
    from davae_jax.cli.convert import Convert

if __name__ == "__main__":
    exit_with(lambda: run_command(lambda: Convert, None, "convert.from_torch"))
