"""What is asked of each text's own posterior, and posterior means of a fixed spread."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from davae_jax.model.latent import Posterior, kl_per_dimension
from davae_jax.regularizers.protocol import LatentBatch, Logs, Params, Regularizer
from davae_jax.regularizers.registry import register


@register("capacity")
@dataclass(frozen=True)
class Capacity(Regularizer):
    """|KL − C| with KL the mean over the texts and C growing linearly (Burgess et al. 2018); γ is the weight. In place
    of the KL: --beta.start 0 --beta.max 0.
    """

    start: float = 0.0
    """C at the beginning, in nats."""

    end: float = 25.0
    """C at its highest."""

    until: float = 0.5
    """Part of the training after which C stays there."""

    def __post_init__(self):
        super().__post_init__()
        self.check("start end", lambda x: 0 <= x < float("inf"), "be 0 or more and finite")
        self.check("until", lambda x: 0 < x <= 1, "be above 0 and at most 1")

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        kl = batch.average(kl_per_dimension(Posterior(batch.mean, batch.logvar)).sum(-1))
        C = self.start + (self.end - self.start) * jnp.minimum(batch.step / (self.until * batch.steps), 1.0)
        return jnp.abs(kl - C), {"capacity": C}


@register("logvar")
@dataclass(frozen=True)
class LogVariance(Regularizer):
    """Σ_l |logvar_l|, mean over the texts: keeps an autoencoder's noise from going to 0 (Rubenstein et al. 2018; the
    LAAE of Shen et al. 2020 has it). Meant for losses without the KL: --beta.start 0 --beta.max 0.
    """

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        return batch.average(jnp.abs(batch.logvar).sum(-1)), {}


def batch_normalized(posterior: Posterior, gamma: float, mean) -> tuple[Posterior, Float[Array, "L"]]:
    """Means centred and scaled so that over the batch's texts each dimension has mean 0 and deviation γ, and what its
    deviation was before.

    BN-VAE (Zhu et al. 2020): the mean KL is then at least L·γ²/2, as it is at least half the means' variance. The
    paper's shift, which it learns from 0 on, stays 0.

    mean: over the texts (`train_step.mean_over_texts`).
    """
    centred = posterior.mean - mean(posterior.mean)
    deviation = jnp.sqrt(mean(jnp.square(centred)) + 1e-12)
    return posterior._replace(mean=centred * (gamma / deviation)), deviation


def normalized_head(
    weight_OD: Float[Array, "2L D"], gamma: float, deviation: Float[Array, "L"], pooled: Float[Array, "D"]
) -> Float[Array, "2L D"]:
    """The posterior head, its means' rows brought a tenth of the way to where they need no normalization.

    What training computes does not depend on these rows' length, as their outputs are scaled anyway, and on their part
    along the mean of what the head reads only in so far as texts differ along it, as outputs are centred anyway. So
    both hold the running statistics: whoever uses the weights without a batch gets means of mean 0 and deviation γ.

    pooled: mean over the texts of the head's input.
    """
    factor = jnp.clip((gamma / deviation) ** 0.1, 0.5, 2.0)
    means, logvars = jnp.split(weight_OD, 2)
    along = (means @ pooled)[:, None] * pooled / (jnp.square(pooled).sum() + 1e-12)
    return jnp.concatenate([(means - 0.1 * along) * factor[:, None], logvars]).astype(weight_OD.dtype)
