"""The Gaussian latent: the posterior, its samples, and its KL divergence to the standard normal prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from davae_jax.utils.shapes import power_of_two


class Posterior(NamedTuple):
    """The diagonal Gaussian q(z | text). Both fields are float32 [B, L]."""

    mean: Float[Array, "B L"]
    logvar: Float[Array, "B L"]

    def sample(self, key: jax.Array, std_scale: float = 1.0) -> Float[Array, "B L"]:
        """Samples a latent; `std_scale` multiplies the standard deviation (1.5 in the published settings)."""
        return self.at(jax.random.normal(key, self.mean.shape), std_scale)

    def at(self, eps: Float[Array, "B L"], std_scale: float = 1.0) -> Float[Array, "B L"]:
        """Returns mean + eps · exp(logvar/2) · std_scale (the reparameterization of Kingma & Welling 2014)."""
        return self.mean + eps * jnp.exp(0.5 * self.logvar) * std_scale


def kl_per_dimension(posterior: Posterior) -> Float[Array, "B L"]:
    """Returns KL(q ‖ N(0, 1)) of each latent dimension, in nats: ½(mean² + exp(logvar) − logvar − 1)."""
    mean, logvar = posterior
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - logvar - 1)


def log_normal(z: Float[Array, "*B L"], mean, logvar) -> Float[Array, "*B L"]:
    """Returns log N(z; mean, exp(logvar)) of each dimension.

    The difference is standardized before it is squared: a latent of a very small variance is its mean after rounding,
    and 0² · exp(−logvar) would be NaN where the exponential overflows (below −88).
    """
    standardized = (z - mean) * jnp.exp(-0.5 * logvar)
    return -0.5 * (jnp.square(standardized) + logvar + math.log(2 * math.pi))


def hard_free_bits_kl(kl: Float[Array, "B L"], dim_target_kl: float) -> Float[Array, "B"]:
    """Returns the published free-bits KL: the sum over the dimensions whose KL exceeds the target (a hard mask)."""
    return jnp.where(kl > dim_target_kl, kl, 0).sum(-1)


def with_unit_variance(posterior: Posterior) -> Posterior:
    """Returns the posterior with log-variance 0 (fb_mode 2): its latent has unit noise, and its KL is ½ Σ mean²."""
    return Posterior(posterior.mean, jnp.zeros_like(posterior.logvar))


# The functions below take any number of latents or steps. They compute a few numbers, by NumPy: compiled, each number
# would be another program.


def interpolate(a: Float[Array, "... L"], b: Float[Array, "... L"], steps: int) -> Float[np.ndarray, "steps ... L"]:
    """Returns `steps` latents on the straight line from a to b, both ends included."""
    a, b, weight = _ends_and_weights(a, b, steps)
    return (1 - weight) * a + weight * b


def slerp(a: Float[Array, "... L"], b: Float[Array, "... L"], steps: int) -> Float[np.ndarray, "steps ... L"]:
    """Returns `steps` latents on the great arc from a to b, both ends included (Shoemake 1985; White 2016 for latents).

    If a and b have the same length, so do all latents between them, while the straight line passes closer to the
    origin, where a Gaussian of many dimensions has hardly any mass. If the arc is not defined or not needed (a and b
    point in the same or in opposite directions, or one of them is 0) the result is the straight line.
    """
    a, b, weight = _ends_and_weights(a, b, steps)
    lengths = np.linalg.norm(a, axis=-1, keepdims=True) * np.linalg.norm(b, axis=-1, keepdims=True)
    cosine = (a * b).sum(-1, keepdims=True) / np.where(lengths > 0, lengths, 1)
    angle = np.arccos(np.clip(cosine, -1, 1))
    straight = (lengths == 0) | (np.sin(angle) < 1e-3)  # float32's arccos is inexact near 0 and π
    sine = np.where(straight, 1, np.sin(angle))
    arc = (np.sin((1 - weight) * angle) * a + np.sin(weight * angle) * b) / sine
    return np.where(straight, interpolate(a, b, steps), arc)


def _ends_and_weights(a, b, steps: int) -> list[np.ndarray]:
    """Returns a and b, and the weights of b, in float32."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    weight = np.linspace(0, 1, steps, dtype=np.float32)
    return [a, b, weight.reshape(-1, *[1] * a.ndim)]


def combine(latents: Float[Array, "k ... L"], weights: Sequence[float]) -> Float[np.ndarray, "... L"]:
    """Returns Σ weight · latent, for sums, differences and means of latents."""
    return np.tensordot(np.asarray(weights, np.float32), np.asarray(latents, np.float32), axes=1)


def attribute_vector(having: Float[Array, "n L"], lacking: Float[Array, "m L"]) -> Float[np.ndarray, "L"]:
    """Returns the mean of the latents that have an attribute minus that of those that lack it (Larsen et al. 2016)."""
    having, lacking = (np.asarray(latents, np.float32).mean(axis=0) for latents in (having, lacking))
    return having - lacking


def traverse(
    z: Float[Array, "... L"], direction: Float[Array, "L"], step: float, each_side: int
) -> Float[np.ndarray, "steps ... L"]:
    """Returns 2 · `each_side` + 1 latents on the line through z, neighbouring ones `step` apart; the middle one is z.

    direction: a vector of length 1, along which the prior's standard deviation is 1.
    """
    z = np.asarray(z, np.float32)
    offsets = np.float32(step) * np.arange(-each_side, each_side + 1, dtype=np.float32)
    return z + offsets.reshape(-1, *[1] * z.ndim) * np.asarray(direction, np.float32)


def neighbours(z: Float[Array, "L"], n: int, radius: float, key: jax.Array) -> Float[np.ndarray, "n L"]:
    """Returns n latents at the distance `radius` from z, in uniformly random directions.

    The i-th direction is the same for every n.
    """
    z = np.asarray(z, np.float32)
    direction = np.asarray(jax.random.normal(key, (power_of_two(n), len(z))))[:n]
    return z + np.float32(radius) * direction / np.linalg.norm(direction, axis=-1, keepdims=True)


def analogy(a: Float[Array, "... L"], b: Float[Array, "... L"], c: Float[Array, "... L"]) -> Float[Array, "... L"]:
    """Returns b − a + c, which is to c as b is to a (Mikolov et al. 2013)."""
    return b - a + c
