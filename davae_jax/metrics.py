"""How much of the latent is used: active units, mutual information, importance-weighted likelihood."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from davae_jax.latent import Posterior
from davae_jax.losses import reconstruction_nll
from davae_jax.model import DAVAE, merge, split

LOG_2PI = math.log(2 * math.pi)


def active_units(means: Float[Array, "n L"], threshold: float = 0.01) -> int:
    """Dimensions whose posterior mean varies over the texts by more than the threshold (Burda et al. 2016)."""
    return int((np.var(np.asarray(means), axis=0) > threshold).sum())


def mutual_information(means: Float[Array, "n L"], logvars: Float[Array, "n L"], key: jax.Array) -> float:
    """I(text; z) under the encoder, in nats: E[log q(z|x) − log q(z)] over one z of each text (Hoffman & Johnson 2016).

    q(z) is the mean of the n posteriors, and the same z stands in both terms, so that an estimate never passes its
    ceiling, `mutual_information_ceiling(n)`.
    """
    return float(_mutual_information(jnp.asarray(means), jnp.asarray(logvars), key))


def mutual_information_ceiling(n: int) -> float:
    """log n: what n texts that share nothing would give."""
    return math.log(n)


@jax.jit
def _mutual_information(means, logvars, key):
    n = len(means)
    z_nL = Posterior(means, logvars).sample(key)

    def log_ratio(z_and_own):
        z_L, own = z_and_own
        log_q = _log_normal(z_L, means, logvars)  # of this z under every text's posterior
        return log_q[own] - (logsumexp(log_q) - math.log(n))

    return lax.map(log_ratio, (z_nL, jnp.arange(n)), batch_size=64).mean()


def _log_normal(z, mean, logvar):
    """log N(z; mean, exp(logvar)), summed over the last axis."""
    return -0.5 * (jnp.square(z - mean) * jnp.exp(-logvar) + logvar + LOG_2PI).sum(-1)


def iw_log_likelihood(
    model: DAVAE, encoder_ids: Int[Array, "B S"], decoder_ids: Int[Array, "B T"], *, samples: int, key: jax.Array
) -> Float[Array, "B"]:
    """log p(text) from below, in nats: log mean over K samples of p(x|z) p(z) / q(z|x) (Burda et al. 2016).

    Args:
      decoder_ids: rows begin with bos and end with one end id, which counts; what follows it is padding.
      samples: K. The bound rises with K to the likelihood itself.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    return _iw_log_likelihood(*split(model), jnp.asarray(encoder_ids), jnp.asarray(decoder_ids), key, samples)


@partial(jax.jit, static_argnums=(0, 5))
def _iw_log_likelihood(graphdef, params, encoder_ids, decoder_ids, key, samples):
    model = merge(graphdef, params)
    posterior = model.encode(encoder_ids)
    targets = decoder_ids[:, 1:]
    mask = text_mask(targets, model.config.end_token_id)

    def log_weight(key):
        z = posterior.sample(key)
        output = model.decoder(decoder_ids[:, :-1], z)
        log_p = -reconstruction_nll(model.decoder.logits(output.final), targets, mask)
        return log_p + _log_normal(z, 0.0, jnp.zeros(())) - _log_normal(z, *posterior)

    # One sample after another: memory does not grow with their number.
    log_weights = lax.map(log_weight, jax.random.split(key, samples))
    return logsumexp(log_weights, axis=0) - math.log(samples)


def text_mask(targets: Int[Array, "B T"], end_id: int) -> Array:
    """Which of the targets count: all up to and with the first end token of a row."""
    is_end = targets == end_id
    return jnp.cumsum(is_end, axis=1) - is_end == 0
