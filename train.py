"""Trains a DAVAE: `python train.py` for the demo, `python train.py --help` for everything else.

To read how a run works, begin with davae_jax/training/loop.py.
"""

from davae_jax.utils.signals import importing

with importing("train.py"):
    from davae_jax.cli.base import exit_with
    from davae_jax.cli.train import main
    from davae_jax.utils.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()
    exit_with(main)
