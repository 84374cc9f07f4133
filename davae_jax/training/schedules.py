"""Computes the values that change with the step: the KL weight β and the learning rate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from davae_jax.training.config import BetaConfig, OptimizerConfig


def beta_at(step: int | Array, steps: int, config: BetaConfig) -> Float[Array, ""]:
    """Returns β of a step, counted from 0, out of `steps`."""
    # Integer arithmetic, because in float32 the first step of some cycles would be assigned to the previous cycle.
    position = (jnp.asarray(step, jnp.int32) * config.cycles % steps) / steps  # within the cycle, in [0, 1)
    if config.ratio_increase:
        progress = jnp.clip((position - config.ratio_zero) / config.ratio_increase, 0.0, 1.0)
    else:
        progress = jnp.float32(position >= config.ratio_zero)
    if config.shape == "sigmoid":
        low, high = jax.nn.sigmoid(-5.0), jax.nn.sigmoid(5.0)
        progress = (jax.nn.sigmoid(10 * progress - 5) - low) / (high - low)
    return config.start + (config.max - config.start) * progress


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the schedule of the learning rate: step, counted from 0, → rate."""
    warmup, decay = config.count_warmup(steps), config.decay_steps
    peak = config.learning_rate
    parts, boundaries = [optax.linear_schedule(0.0, peak, max(warmup, 1))], [warmup]
    if config.schedule == "cosine":
        parts += [optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=config.end)]
    else:
        parts += [optax.constant_schedule(peak)]
    if decay:
        parts += [optax.linear_schedule(peak, config.end * peak, decay)]
        boundaries += [steps - decay]
    return optax.join_schedules(parts, boundaries)
