"""davae-jax: the text VAE Randeng-DAVAE-1.2B in JAX and Flax NNX."""

from davae_jax.checkpoints.pretrained import from_pretrained
from davae_jax.evaluation import metrics
from davae_jax.inference import sampling
from davae_jax.inference.generation import generate
from davae_jax.inference.text_vae import TextVAE
from davae_jax.model import losses
from davae_jax.model.config import DAVAEConfig, DecoderConfig, EncoderConfig
from davae_jax.model.davae import DAVAE
from davae_jax.model.decoder import Memory
from davae_jax.model.latent import Posterior
from davae_jax.utils.errors import InputError

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
