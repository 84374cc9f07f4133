"""Additional loss terms on the latents: a protocol, a registry, and regularizers from the literature.

See docs/regularizers.md.
"""

from davae_jax.regularizers.config import RegularizersConfig, config_with_plugins
from davae_jax.regularizers.critic import WGAN
from davae_jax.regularizers.decomposition import TCVAE
from davae_jax.regularizers.divergences import MMD, SIGReg, SlicedWasserstein
from davae_jax.regularizers.posteriors import Capacity, LogVariance, batch_normalized, normalized_head
from davae_jax.regularizers.protocol import Adversarial, LatentBatch, Learned, Params, Regularizer, Sizes, weight_at
from davae_jax.regularizers.registry import (
    REGISTRY,
    active,
    check_registered,
    load_installed,
    load_plugin,
    plugin_digest,
    register,
)
from davae_jax.regularizers.terms import RegularizerError, init_regularizer_params, regularizer_terms
from davae_jax.regularizers.words import BagOfWords

__all__ = [
    "MMD",
    "REGISTRY",
    "TCVAE",
    "WGAN",
    "Adversarial",
    "BagOfWords",
    "Capacity",
    "LatentBatch",
    "Learned",
    "LogVariance",
    "Params",
    "Regularizer",
    "RegularizerError",
    "RegularizersConfig",
    "SIGReg",
    "Sizes",
    "SlicedWasserstein",
    "active",
    "batch_normalized",
    "check_registered",
    "config_with_plugins",
    "init_regularizer_params",
    "load_installed",
    "load_plugin",
    "normalized_head",
    "plugin_digest",
    "register",
    "regularizer_terms",
    "weight_at",
]
