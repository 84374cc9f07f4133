"""Estimates the distance of the latents from the prior by a critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from davae_jax.regularizers.protocol import Adversarial, LatentBatch, Logs, Params, Sizes
from davae_jax.regularizers.registry import register
from davae_jax.utils.lazy import jax, jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@register("wgan")
@dataclass(frozen=True)
class WGAN(Adversarial):
    """The 1-Wasserstein distance of latents and prior, estimated by a critic f with a gradient penalty (Gulrajani et
    al. 2017): E f(prior) − E f(z).

    The critic minimizes E f(z) − E f(prior) + λ E (‖∇f(x)‖ − 1)², with x uniform on the line between a sample of the
    prior and a latent. It takes one step per step of the model; the paper's five would need five batches.
    """

    learning_rate: float = 1e-4
    """Learning rate of the critic; constant."""

    hidden: int = 256
    """Width of the critic's two hidden layers."""

    gradient_penalty: float = 10.0
    """Weight λ of the gradient penalty."""

    def __post_init__(self):
        super().__post_init__()
        self.check("hidden", lambda n: n >= 1, "be at least 1")
        self.check("gradient_penalty", lambda x: 0 <= x < float("inf"), "be 0 or more and finite")

    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        widths = [sizes.latent, self.hidden, self.hidden, 1]
        keys, initializer = jax.random.split(key, 3), jax.nn.initializers.he_normal()
        return {
            f"layer_{i}": {"weight": initializer(keys[i], (widths[i], widths[i + 1])), "bias": jnp.zeros(widths[i + 1])}
            for i in range(3)
        }

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        return batch.average(critic(params, batch.prior)) - batch.average(critic(params, batch.z)), {}

    def adversary(self, batch: LatentBatch, params: Params) -> Float[Array, ""]:
        t = jax.random.uniform(batch.key, (len(batch.z), 1)).astype(batch.z.dtype)
        x = t * batch.prior + (1 - t) * batch.z
        gradient = jax.grad(lambda x: critic(params, x).sum())(x)
        norm = jnp.sqrt(jnp.square(gradient).sum(-1) + 1e-12)  # √0 would have an infinite derivative
        penalty = batch.average(jnp.square(norm - 1))
        return -self(batch, params)[0] + self.gradient_penalty * penalty


def critic(params: Params, x: Float[Array, "B L"]) -> Float[Array, "B"]:
    """Applies the critic f: three linear layers with leaky ReLUs between them."""
    for i in range(3):
        layer = params[f"layer_{i}"]
        x = (jax.nn.leaky_relu(x, 0.2) if i else x) @ layer["weight"] + layer["bias"]
    return x[:, 0]
