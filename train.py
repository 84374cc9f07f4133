"""Trains a DAVAE: `python train.py` for the demo, `python train.py --help` for everything else.

To read how a run works, begin with davae_jax/training/loop.py.
"""

from davae_jax.cli.base import exit_with
from davae_jax.cli.train import main

if __name__ == "__main__":
    exit_with(main)
