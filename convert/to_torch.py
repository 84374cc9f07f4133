"""Writes a davae-jax checkpoint in the published PyTorch layout.

    python -m convert.to_torch SRC DST

The same as `davae export`.
"""

from davae_jax.utils.signals import importing

with importing("convert.to_torch"):
    from davae_jax.cli.base import exit_with, run_command
    from davae_jax.cli.export import Export

if __name__ == "__main__":
    exit_with(lambda: run_command(lambda: Export, None, "convert.to_torch"))
