"""davae-jax: the text VAE Randeng-DAVAE-1.2B in JAX and Flax NNX."""

from davae_jax import losses, metrics, sampling
from davae_jax.checkpoint import from_pretrained
from davae_jax.config import DAVAEConfig, DecoderConfig, EncoderConfig
from davae_jax.decoder import Memory
from davae_jax.errors import InputError
from davae_jax.generation import generate
from davae_jax.latent import Posterior
from davae_jax.model import DAVAE
from davae_jax.text import TextVAE

__all__ = [
    "DAVAE",
    "DAVAEConfig",
    "DecoderConfig",
    "EncoderConfig",
    "InputError",
    "Memory",
    "Posterior",
    "TextVAE",
    "from_pretrained",
    "generate",
    "losses",
    "metrics",
    "sampling",
]
