"""davae-jax checkpoint → a folder in the published PyTorch layout.

    python -m convert.to_torch SRC DST

The same as `davae export`.
"""

from davae_jax.cli.base import leave, run
from davae_jax.cli.export import Export

if __name__ == "__main__":
    leave(lambda: run(lambda: Export, None, "convert.to_torch"))
