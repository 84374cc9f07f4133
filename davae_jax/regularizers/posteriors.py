"""Defines regularizers of each text's posterior, and batch normalization of the posterior means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from davae_jax.regularizers.protocol import LatentBatch, Logs, Params, Regularizer
from davae_jax.regularizers.registry import register
from davae_jax.utils.lazy import jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from davae_jax.model.latent import Posterior


@register("capacity")
@dataclass(frozen=True)
class Capacity(Regularizer):
    """Controlled capacity (Burgess et al. 2018): |KL − C|, where KL is the mean over the texts and C grows linearly.

    The paper's γ is the weight. Replaces the KL of the loss: use --beta.start 0 --beta.max 0.
    """

    start: float = 0.0
    """Initial capacity C, in nats."""

    end: float = 25.0
    """Final capacity C, in nats."""

    until: float = 0.5
    """Fraction of the training over which C grows; it then remains at its final value."""

    def __post_init__(self):
        super().__post_init__()
        self.check("start end", lambda x: 0 <= x < float("inf"), "be 0 or more and finite")
        self.check("until", lambda x: 0 < x <= 1, "be above 0 and at most 1")

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        from davae_jax.model.latent import Posterior, kl_per_dimension  # needs JAX

        kl = batch.average(kl_per_dimension(Posterior(batch.mean, batch.logvar)).sum(-1))
        C = self.start + (self.end - self.start) * jnp.minimum(batch.step / (self.until * batch.steps), 1.0)
        return jnp.abs(kl - C), {"capacity": C}


@register("logvar")
@dataclass(frozen=True)
class LogVariance(Regularizer):
    """Σ_l |logvar_l|, averaged over the texts: keeps the noise of an autoencoder from vanishing (Rubenstein et al.
    2018; used by the LAAE of Shen et al. 2020). For losses without the KL: use --beta.start 0 --beta.max 0.
    """

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        return batch.average(jnp.abs(batch.logvar).sum(-1)), {}


def batch_normalized(posterior: Posterior, gamma: float, mean) -> tuple[Posterior, Float[Array, "L"]]:
    """Normalizes the posterior means to mean 0 and standard deviation γ in each dimension, over the texts of the batch.

    BN-VAE (Zhu et al. 2020): the mean KL is at least half the variance of the means, hence at least L·γ²/2. The shift
    that the paper learns, initialized to 0, stays 0 here.

    Args:
      mean: computes the mean over the texts of the batch (`training.objective.mean_over_texts`).

    Returns:
      The posterior with normalized means, and their standard deviation per dimension before normalization.
    """
    centred = posterior.mean - mean(posterior.mean)
    deviation = jnp.sqrt(mean(jnp.square(centred)) + 1e-12)
    return posterior._replace(mean=centred * (gamma / deviation)), deviation


def normalized_head(
    weight_OD: Float[Array, "2L D"], gamma: float, deviation: Float[Array, "L"], pooled: Float[Array, "D"]
) -> Float[Array, "2L D"]:
    """Moves the mean rows of the posterior head a tenth of the way to values for which normalization changes nothing.

    With `batch_normalized` the length of these rows has no effect in training, because their outputs are rescaled, and
    their component along the mean of the head's input has almost none, because their outputs are centred. Both can
    therefore store the running statistics: without a batch, the same weights give means of mean 0 and standard
    deviation γ.

    Args:
      pooled: the mean over the texts of the head's input.
    """
    factor = jnp.clip((gamma / deviation) ** 0.1, 0.5, 2.0)
    means, logvars = jnp.split(weight_OD, 2)
    projection = (means @ pooled)[:, None] * pooled / (jnp.square(pooled).sum() + 1e-12)
    return jnp.concatenate([(means - 0.1 * projection) * factor[:, None], logvars]).astype(weight_OD.dtype)
