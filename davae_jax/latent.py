"""The Gaussian latent: the posterior, its samples, and its KL divergence to the standard normal prior."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Posterior(NamedTuple):
    """q(z | text), a diagonal Gaussian. Both fields are float32 [B, L]."""

    mean: Float[Array, "B L"]
    logvar: Float[Array, "B L"]

    def sample(self, key: jax.Array, std_scale: float = 1.0) -> Float[Array, "B L"]:
        """A draw; `std_scale` widens it (the published generation settings use 1.5)."""
        return self.at(jax.random.normal(key, self.mean.shape), std_scale)

    def at(self, eps: Float[Array, "B L"], std_scale: float = 1.0) -> Float[Array, "B L"]:
        """mean + eps · exp(logvar/2) · std_scale (Kingma & Welling 2014, the reparameterisation)."""
        return self.mean + eps * jnp.exp(0.5 * self.logvar) * std_scale


def kl_per_dimension(posterior: Posterior) -> Float[Array, "B L"]:
    """KL(q ‖ N(0, 1)) of each latent dimension, in nats: ½(mean² + exp(logvar) − logvar − 1)."""
    mean, logvar = posterior
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - logvar - 1)


def free_bits_kl(kl: Float[Array, "B L"], dim_target_kl: float) -> Float[Array, "B"]:
    """The published free bits: the sum over those dimensions alone whose KL is above the target (a hard mask)."""
    return jnp.where(kl > dim_target_kl, kl, 0).sum(-1)


def deterministic(posterior: Posterior) -> Posterior:
    """fb_mode 2: the log-variance replaced by 0, so the latent has unit noise and KL = ½ Σ mean²."""
    return Posterior(posterior.mean, jnp.zeros_like(posterior.logvar))


def interpolate(a: Float[Array, "... L"], b: Float[Array, "... L"], steps: int) -> Float[Array, "steps ... L"]:
    """`steps` latents on the straight line from a to b, both ends included."""
    weight = jnp.linspace(0, 1, steps).reshape(-1, *[1] * jnp.ndim(a))
    return (1 - weight) * a + weight * b


def analogy(a: Float[Array, "... L"], b: Float[Array, "... L"], c: Float[Array, "... L"]) -> Float[Array, "... L"]:
    """b − a + c: what is to c as b is to a (Mikolov et al. 2013)."""
    return b - a + c
