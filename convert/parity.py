"""Compares PyTorch and JAX on a checkpoint, module by module.

    python -m convert.parity SRC

The same as `davae parity`.
"""

from davae_jax.cli.base import leave, run
from davae_jax.cli.parity import Parity

if __name__ == "__main__":
    leave(lambda: run(lambda: Parity, None, "convert.parity"))
