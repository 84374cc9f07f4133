"""Compares PyTorch and JAX on a checkpoint, module by module.

    python -m convert.parity SRC

The same as `davae parity`.
"""

from davae_jax.utils.signals import importing

with importing("convert.parity"):
    from davae_jax.cli.base import exit_with, run_command
    from davae_jax.cli.parity import Parity

if __name__ == "__main__":
    exit_with(lambda: run_command(lambda: Parity, None, "convert.parity"))
