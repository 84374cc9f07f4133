"""Estimates the use of the latent, the distance of the posteriors from the prior, and the likelihood of texts.

docs/evaluate.md gives the formula, the source and the limits of each metric. Random functions take a key.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int, Key

from davae_jax.model.davae import DAVAE, merge, split
from davae_jax.model.latent import Posterior, log_normal
from davae_jax.model.losses import reconstruction_nll


def active_units(means: Float[Array, "n L"], threshold: float = 0.01) -> int:
    """Counts the dimensions whose posterior mean has a variance above the threshold (Burda et al. 2016)."""
    return int((np.var(np.asarray(means), axis=0) > threshold).sum())


def mutual_information(means: Float[Array, "n L"], logvars: Float[Array, "n L"], key: jax.Array) -> float:
    """Estimates I(text; z) under the encoder, in nats: E[log q(z|x) − log q(z)] (Hoffman & Johnson 2016).

    The expectation is over one z per text, and q(z) is the mean of the n posteriors. Both terms use the same z, so the
    estimate never exceeds its ceiling, `mutual_information_ceiling(n)`. Above about half of the ceiling it is too low,
    because a text's own posterior makes up 1/n of this q(z), but a negligible fraction of the true one.
    `aggregate_density_by_halves` shows how much the estimate depends on n.
    """
    return float(log_densities(means, logvars, key).information.mean())


def mutual_information_ceiling(n: int) -> float:
    """Returns log n, the estimate for n texts whose posteriors do not overlap."""
    return math.log(n)


def aggregate_kl(means: Float[Array, "n L"], logvars: Float[Array, "n L"], key: jax.Array) -> float:
    """Estimates KL(q(z) ‖ p(z)) in nats, with q(z) the mean of the n posteriors: E[log q(z) − log p(z)].

    The mean KL of the posteriors is the sum of this and the mutual information (Hoffman & Johnson 2016). The estimate
    is therefore too high by as much as the mutual information is too low: a large value may only mean that n is small.
    """
    return float(log_densities(means, logvars, key).from_prior.mean())


class LogDensities(NamedTuple):
    """Holds log densities of one z per text, in nats."""

    posterior: Float[Array, " n"]  # log q(z|x), where x is the text that z was sampled for
    aggregate: Float[Array, " n"]  # log q(z), the mean of all n posteriors
    prior: Float[Array, " n"]  # log p(z)
    z: Float[Array, "n L"]

    @property
    def information(self) -> Float[Array, " n"]:
        """Returns log q(z|x) − log q(z), whose mean is the mutual information."""
        return self.posterior - self.aggregate

    @property
    def from_prior(self) -> Float[Array, " n"]:
        """Returns log q(z) − log p(z), whose mean is the aggregate KL."""
        return self.aggregate - self.prior


def log_densities(means: Float[Array, "n L"], logvars: Float[Array, "n L"], key: jax.Array) -> LogDensities:
    """Samples one z per text and computes its log density under its posterior, under their mean, and under the prior.

    If the arrays are sharded by rows, each device computes the densities under the posteriors of its rows.
    """
    return LogDensities(*_log_densities(jnp.asarray(means), jnp.asarray(logvars), key))


def aggregate_density_by_halves(
    densities: LogDensities,
    means: Float[Array, "n L"],
    logvars: Float[Array, "n L"],
    seed: int = 0,
    shard: Callable[[Any], Any] = lambda arrays: arrays,
) -> Float[np.ndarray, " n"]:
    """Computes log q(z) of the same z in nats, with q(z) the mean over the half of the texts that contains the text.

    The increase over log q(z) from all texts is about the change from another doubling of n, as long as it is small;
    near the ceiling, each doubling changes the estimate by log 2. NaN for one text.

    Args:
      seed: determines the random split into halves.
      shard: shards arrays over devices by rows.
    """
    n = len(means)
    log_q = np.full(n, np.nan)
    for half in np.array_split(np.random.default_rng(seed % 2**32).permutation(n), 2) if n > 1 else ():
        z, *posteriors = (np.asarray(x)[half] for x in (densities.z, means, logvars))
        log_q[half] = _compute_densities(z, *shard(tuple(posteriors)))[1]
    return log_q


@jax.jit
def _log_densities(means, logvars, key):
    z_nL = Posterior(means, logvars).sample(key)
    return *_compute_densities(z_nL, means, logvars), z_nL


@jax.jit
def _compute_densities(z_nL, means, logvars):
    n, L = means.shape

    def densities(z_and_text):
        z_L, text = z_and_text
        log_q = log_density(z_L, means, logvars)  # of this z under every text's posterior
        return log_q[text], logsumexp(log_q) - math.log(n), log_density(z_L, 0.0, jnp.zeros(()))

    chunk = max(1, min(64, 2**24 // (n * L)))  # 64 MiB of differences
    return lax.map(densities, (z_nL, jnp.arange(n)), batch_size=chunk)


def log_density(z: Float[Array, "*B L"], mean, logvar) -> Float[Array, "*B"]:
    """Returns log N(z; mean, exp(logvar)), summed over the last axis."""
    return log_normal(z, mean, logvar).sum(-1)


def mmd_to_prior(z: Float[np.ndarray, "n L"]) -> float:
    """Estimates the squared maximum mean discrepancy between q(z) and the prior N(0, I) (Gretton et al. 2012).

    The estimate is unbiased. The kernel is exp(−|x − y|² / 2h²) with h² = L, half the mean squared distance of two
    prior samples. The expectations over the prior are in closed form (Rustamov 2021), so only z is random. The
    value is 0 if q(z) is the prior, up to noise that may make it negative, and at most about 1.

    Args:
      z: one sample from each text's posterior.
    """
    z = np.asarray(z, np.float64)
    n, L = z.shape
    h2 = float(L)
    squares = (z**2).sum(1)
    within = sum(
        np.exp(-np.maximum(squares[i : i + 256, None] + squares - 2 * z[i : i + 256] @ z.T, 0) / (2 * h2)).sum()
        for i in range(0, n, 256)
    )
    within = (within - n) / (n * (n - 1)) if n > 1 else math.nan  # excludes the pairs of a z with itself
    across = (h2 / (h2 + 1)) ** (L / 2) * np.exp(-squares / (2 * (h2 + 1))).mean()
    return float(within - 2 * across + (h2 / (h2 + 2)) ** (L / 2))


def iw_log_likelihood(
    model: DAVAE, encoder_ids: Int[Array, "B S"], decoder_ids: Int[Array, "B T"], *, samples: int, key: jax.Array
) -> Float[Array, "B"]:
    """Bounds log p(text) from below, in nats: log mean over K samples of p(x|z) p(z) / q(z|x) (Burda et al. 2016).

    Args:
      decoder_ids: each row begins with bos and ends with one end id, which belongs to the text; padding follows.
      samples: number of importance samples (K). The bound approaches the likelihood as K grows.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    return _iw_log_likelihood(*split(model), jnp.asarray(encoder_ids), jnp.asarray(decoder_ids), key, samples)


@partial(jax.jit, static_argnums=(0, 5))
def _iw_log_likelihood(graphdef, params, encoder_ids, decoder_ids, key, samples):
    model = merge(graphdef, params)
    keys = jax.random.split(key, len(encoder_ids))
    log_p, log_ratio = importance_samples(
        model.encode(encoder_ids), partial(text_log_likelihood, model, decoder_ids), keys, samples
    )
    return log_mean_weight(log_p + log_ratio)


def text_log_likelihood(model: DAVAE, decoder_ids: Int[Array, "B T"], z: Float[Array, "B L"]) -> Float[Array, "B"]:
    """Computes log p(text | z) in nats; `decoder_ids` are as in `iw_log_likelihood`."""
    targets = decoder_ids[:, 1:]
    output = model.decoder(decoder_ids[:, :-1], z)
    return -reconstruction_nll(
        model.decoder.logits(output.final), targets, text_mask(targets, model.config.end_token_id)
    )


def importance_samples(
    posterior: Posterior,
    log_likelihood: Callable[[Float[Array, "B L"]], Float[Array, "B"]],
    keys: Key[Array, "B"],
    samples: int,
) -> tuple[Float[Array, "K B"], Float[Array, "K B"]]:
    """Samples K latents from each posterior and computes log p(x|z) and log p(z) − log q(z|x).

    The sum of the two is the logarithm of the importance weight.

    Args:
      keys: one per text, so that the samples of a text do not depend on the rest of the batch.
    """

    def sample(k):
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, k), posterior.mean.shape[1:]))(keys)
        z = posterior.at(noise)
        return log_likelihood(z), log_density(z, 0.0, jnp.zeros(())) - log_density(z, *posterior)

    # Samples are processed one after another, so that memory does not grow with K.
    return lax.map(sample, jnp.arange(samples))


def log_mean_weight(log_weights: Float[Array, "K *B"]) -> Float[Array, "*B"]:
    """Returns the logarithm of the mean of K weights."""
    return logsumexp(log_weights, axis=0) - math.log(log_weights.shape[0])


def effective_sample_size(log_weights: Float[Array, "K *B"]) -> Float[Array, "*B"]:
    """Returns (Σ w)² / Σ w² of K weights (Kong 1992): K if all are equal, 1 if a single weight dominates."""
    return jnp.exp(2 * logsumexp(log_weights, axis=0) - logsumexp(2 * log_weights, axis=0))


def text_mask(targets: Int[Array, "B T"], end_id: int) -> Array:
    """Returns a mask of the targets that belong to the text: each row up to and including its first end token."""
    is_end = targets == end_id
    return jnp.cumsum(is_end, axis=1) - is_end == 0
