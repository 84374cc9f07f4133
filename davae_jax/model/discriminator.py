"""The latent discriminator: distinguishes samples from the prior (1) from latents of the encoder (0)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from davae_jax.model.layers import Linear


class Discriminator(nnx.Module):
    """Linear(L → 4L), ReLU, Linear(4L → 1), as published. It returns float32 logits."""

    def __init__(self, latent_size: int, *, rngs, dtype, param_dtype):
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.hidden = Linear(latent_size, 4 * latent_size, ("mlp", None), **kw)
        self.output = Linear(4 * latent_size, 1, (None, "mlp"), **kw)

    def __call__(self, latent: Float[Array, "*B L"]) -> Float[Array, "*B"]:
        return self.output(jax.nn.relu(self.hidden(latent)))[..., 0].astype(jnp.float32)
