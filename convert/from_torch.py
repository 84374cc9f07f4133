"""Published PyTorch checkpoint → a folder that `davae_jax.from_pretrained` reads without PyTorch.

    python -m convert.from_torch SRC DST

The same as `davae convert`.
"""

from davae_jax.cli.base import leave, run
from davae_jax.cli.convert import Convert

if __name__ == "__main__":
    leave(lambda: run(lambda: Convert, None, "convert.from_torch"))
