"""`python -m davae_jax.cli` is the `davae` command."""

from davae_jax.cli.main import script

script()
