"""How much of the latent is used, how well its posteriors fill the prior, and how likely the texts are.

Formulas, sources and limits of each are in docs/evaluate.md. Randomness comes in as a key.
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
from davae_jax.model.latent import Posterior
from davae_jax.model.losses import reconstruction_nll

LOG_2PI = math.log(2 * math.pi)


def active_units(means: Float[Array, "n L"], threshold: float = 0.01) -> int:
    """Dimensions whose posterior mean varies over the texts by more than the threshold (Burda et al. 2016)."""
    return int((np.var(np.asarray(means), axis=0) > threshold).sum())


def mutual_information(means: Float[Array, "n L"], logvars: Float[Array, "n L"], key: jax.Array) -> float:
    """I(text; z) under the encoder, in nats: E[log q(z|x) − log q(z)] over one z of each text (Hoffman & Johnson 2016).

    q(z) is the mean of the n posteriors, and the same z stands in both terms, so that an estimate never passes its
    ceiling, `mutual_information_ceiling(n)`. It is too low already from about half of that on: a text's own posterior
    is 1/n of q(z), where of all texts it would be nothing. `aggregate_density_by_halves` shows by how much n matters.
    """
    return float(log_densities(means, logvars, key).information.mean())


def mutual_information_ceiling(n: int) -> float:
    """log n: what n texts that share nothing would give."""
    return math.log(n)


def aggregate_kl(means: Float[Array, "n L"], logvars: Float[Array, "n L"], key: jax.Array) -> float:
    """KL(q(z) ‖ p(z)) in nats, q(z) being the mean of the n posteriors: E[log q(z) − log p(z)] over one z of each text.

    The mean KL of the posteriors is this and the mutual information together (Hoffman & Johnson 2016), so it is too
    high by what the information is too low: a large value may only mean that n is small.
    """
    return float(log_densities(means, logvars, key).from_prior.mean())


class LogDensities(NamedTuple):
    """Of one z of each text, in nats."""

    own: Float[Array, " n"]  # log q(z|x), of the text it was drawn for
    aggregate: Float[Array, " n"]  # log q(z), of the mean of all n posteriors
    prior: Float[Array, " n"]  # log p(z)
    z: Float[Array, "n L"]  # the draws

    @property
    def information(self) -> Float[Array, " n"]:
        return self.own - self.aggregate

    @property
    def from_prior(self) -> Float[Array, " n"]:
        return self.aggregate - self.prior


def log_densities(means: Float[Array, "n L"], logvars: Float[Array, "n L"], key: jax.Array) -> LogDensities:
    """Draws a z of each text and gives its log density under its own posterior, all of them together, and the prior.

    Of arrays that lie over several devices by rows, each device reads its rows' posteriors.
    """
    return LogDensities(*_log_densities(jnp.asarray(means), jnp.asarray(logvars), key))


def aggregate_density_by_halves(
    densities: LogDensities,
    means: Float[Array, "n L"],
    logvars: Float[Array, "n L"],
    seed: int = 0,
    place: Callable[[Any], Any] = lambda arrays: arrays,
) -> Float[np.ndarray, " n"]:
    """log q(z) of the same draws in nats, q(z) being of the text's own half of the texts alone; the seed parts them.

    By how much it is higher is about what another doubling of n would change, while that is little; near the ceiling
    each doubling brings log 2. NaN for one text.

    place: lays arrays over devices by rows.
    """
    n = len(means)
    found = np.full(n, np.nan)
    for half in np.array_split(np.random.default_rng(seed % 2**32).permutation(n), 2) if n > 1 else ():
        z, *posteriors = (np.asarray(x)[half] for x in (densities.z, means, logvars))
        found[half] = _densities_of(z, *place(tuple(posteriors)))[1]
    return found


@jax.jit
def _log_densities(means, logvars, key):
    z_nL = Posterior(means, logvars).sample(key)
    return *_densities_of(z_nL, means, logvars), z_nL


@jax.jit
def _densities_of(z_nL, means, logvars):
    n, L = means.shape

    def of_one(z_and_own):
        z_L, own = z_and_own
        log_q = log_normal(z_L, means, logvars)  # of this z under every text's posterior
        return log_q[own], logsumexp(log_q) - math.log(n), log_normal(z_L, 0.0, jnp.zeros(()))

    at_once = max(1, min(64, 2**24 // (n * L)))  # 64 MiB of differences
    return lax.map(of_one, (z_nL, jnp.arange(n)), batch_size=at_once)


def log_normal(z, mean, logvar):
    """log N(z; mean, exp(logvar)), summed over the last axis."""
    return -0.5 * (jnp.square(z - mean) * jnp.exp(-logvar) + logvar + LOG_2PI).sum(-1)


def mmd_to_prior(z: Float[np.ndarray, "n L"]) -> float:
    """Squared maximum mean discrepancy between draws of q(z) and the prior N(0, I), without bias (Gretton et al. 2012).

    The kernel is exp(−|x − y|² / 2h²) with h² = L, half the mean squared distance of two draws of the prior. All
    expectations over the prior are known (Rustamov 2021), so that only z is random. 0 where q(z) is the prior, and
    by chance a little below; at most about 1.
    """
    z = np.asarray(z, np.float64)
    n, L = z.shape
    h2 = float(L)
    squares = (z**2).sum(1)
    within = sum(
        np.exp(-np.maximum(squares[i : i + 256, None] + squares - 2 * z[i : i + 256] @ z.T, 0) / (2 * h2)).sum()
        for i in range(0, n, 256)
    )
    within = (within - n) / (n * (n - 1)) if n > 1 else math.nan  # a z and itself are no pair
    across = (h2 / (h2 + 1)) ** (L / 2) * np.exp(-squares / (2 * (h2 + 1))).mean()
    return float(within - 2 * across + (h2 / (h2 + 2)) ** (L / 2))


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
    keys = jax.random.split(key, len(encoder_ids))
    log_p, log_ratio = importance_samples(
        model.encode(encoder_ids), partial(text_log_likelihood, model, decoder_ids), keys, samples
    )
    return log_mean_weight(log_p + log_ratio)


def text_log_likelihood(model: DAVAE, decoder_ids: Int[Array, "B T"], z: Float[Array, "B L"]) -> Float[Array, "B"]:
    """log p(text | z) in nats; `decoder_ids` as for `iw_log_likelihood`."""
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
    """(log p(x|z), log p(z) − log q(z|x)) at K draws of z from the posterior; their sum is the weights' logarithm.

    keys: one a text, so that what a text's draws are does not depend on the texts beside it.
    """

    def one(k):
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, k), posterior.mean.shape[1:]))(keys)
        z = posterior.at(noise)
        return log_likelihood(z), log_normal(z, 0.0, jnp.zeros(())) - log_normal(z, *posterior)

    # One sample after another: memory does not grow with their number.
    return lax.map(one, jnp.arange(samples))


def log_mean_weight(log_weights: Float[Array, "K *B"]) -> Float[Array, "*B"]:
    """Logarithm of the mean of K weights."""
    return logsumexp(log_weights, axis=0) - math.log(log_weights.shape[0])


def effective_sample_size(log_weights: Float[Array, "K *B"]) -> Float[Array, "*B"]:
    """(Σ w)² / Σ w² of K weights (Kong 1992): K where all weigh alike, 1 where one of them is all."""
    return jnp.exp(2 * logsumexp(log_weights, axis=0) - logsumexp(2 * log_weights, axis=0))


def text_mask(targets: Int[Array, "B T"], end_id: int) -> Array:
    """Which of the targets count: all up to and with the first end token of a row."""
    is_end = targets == end_id
    return jnp.cumsum(is_end, axis=1) - is_end == 0
