"""What changes with the step: the KL's weight and the learning rate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from davae_jax.training.config import BetaConfig, OptimizerConfig


def beta_at(step: int | Array, steps: int, config: BetaConfig) -> Float[Array, ""]:
    """β of one step out of `steps`, counted from 0."""
    # In whole numbers as far as it goes: float32 would put the first step of some periods into the one before.
    place = (jnp.asarray(step, jnp.int32) * config.cycles % steps) / steps  # in [0, 1)
    if config.ratio_increase:
        risen = jnp.clip((place - config.ratio_zero) / config.ratio_increase, 0.0, 1.0)
    else:
        risen = jnp.float32(place >= config.ratio_zero)
    if config.shape == "sigmoid":
        low, high = jax.nn.sigmoid(-5.0), jax.nn.sigmoid(5.0)
        risen = (jax.nn.sigmoid(10 * risen - 5) - low) / (high - low)
    return config.start + (config.max - config.start) * risen


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate of each step, counted from 0."""
    warmup = round(config.warmup * steps)
    peak = config.learning_rate
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=config.end)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])
