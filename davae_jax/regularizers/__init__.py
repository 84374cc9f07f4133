"""Terms of the loss on the latents: a protocol, a registry, and those of the literature (docs/regularizers.md)."""

from davae_jax.regularizers.critic import WGAN
from davae_jax.regularizers.decomposition import TCVAE
from davae_jax.regularizers.divergences import MMD, SIGReg, SlicedWasserstein
from davae_jax.regularizers.posteriors import Capacity, LogVariance, batch_normalized, normalized_head
from davae_jax.regularizers.protocol import Adversarial, LatentBatch, Learned, Params, Regularizer, Sizes, weight_at
from davae_jax.regularizers.registry import (
    REGISTRY,
    RegularizerError,
    active,
    check_known,
    digest_of,
    init_own,
    load_plugin,
    options,
    options_type,
    penalty,
    register,
)
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
    "SIGReg",
    "Sizes",
    "SlicedWasserstein",
    "active",
    "batch_normalized",
    "check_known",
    "digest_of",
    "init_own",
    "load_plugin",
    "normalized_head",
    "options",
    "options_type",
    "penalty",
    "register",
    "weight_at",
]
