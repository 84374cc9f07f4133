"""Creates a checkpoint whose encoder is a pretrained BERT and/or whose decoder is a pretrained Transformer-XL.

    python -m convert.warm_start DST --encoder BERT --decoder TRANSFORMER_XL

The same as `davae warm-start`.
"""

from davae_jax.utils.signals import importing

with importing("convert.warm_start"):
    from davae_jax.cli.base import exit_with, run_command
    from davae_jax.cli.warm_start import WarmStart

if __name__ == "__main__":
    exit_with(lambda: run_command(lambda: WarmStart, None, "convert.warm_start"))
