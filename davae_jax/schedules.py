"""What changes with the step: the KL's weight and the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from davae_jax.errors import InputError, check_options


@dataclass(frozen=True)
class BetaConfig:
    """The KL's weight β: a trapezoid (Li et al. 2020, Optimus), repeated for cyclical annealing (Fu et al. 2019).

    A period holds `start` for `ratio_zero` of its steps, rises to `max` over `ratio_increase` of them, and stays there.
    """

    start: float = 1e-4
    """β at a period's beginning."""

    max: float = 0.1
    """β at its end. Equal to `start`: constant (Higgins et al. 2017)."""

    ratio_zero: float = 0.05
    """Part of a period that stays at `start`."""

    ratio_increase: float = 0.5
    """Part of a period over which β rises."""

    cycles: int = 1
    """Periods in the whole training; 1 is the plain trapezoid."""

    shape: Literal["linear", "sigmoid"] = "linear"
    """How β rises. sigmoid: as the logistic function from −5 to 5 (Bowman et al. 2016), scaled to begin and end exactly
    at `start` and `max`."""

    def __post_init__(self):
        check_options(self, "beta.", "start max", lambda x: 0 <= x < float("inf"), "be 0 or more and finite")
        check_options(self, "beta.", "cycles", lambda n: n >= 1, "be at least 1")
        if not (self.ratio_zero >= 0 and self.ratio_increase >= 0 and self.ratio_zero + self.ratio_increase <= 1):
            raise InputError(
                f"--beta.ratio-zero {self.ratio_zero} and --beta.ratio-increase {self.ratio_increase}: "
                "must be 0 or more, and 1 at most together",
                exit_code=2,
            )


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


@dataclass(frozen=True)
class OptimizerConfig:
    """Of encoder and decoder. The defaults are the published settings."""

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    """Loshchilov & Hutter 2019; Shazeer & Stern 2018; Jordan 2024, for the matrices inside the layers, AdamW for the
    rest."""

    learning_rate: float = 5e-5
    """The highest one."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warmup: down to `end` along a cosine, or as it is."""

    warmup: float = 0.01
    """Part of all steps over which the rate rises from 0."""

    end: float = 0.1
    """The cosine's last rate, as a part of the highest."""

    weight_decay: float = 0.1
    """Of matrices; biases and LayerNorms decay never."""

    clip: float = 1.0
    """Largest global norm of the gradient; 0 is off."""

    spike: float = 0.0
    """Skip a step whose gradient's norm is over so many times its running mean; 0 is off."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        finite = "learning_rate weight_decay clip spike"
        check_options(self, "optimizer.", finite, lambda x: 0 <= x < float("inf"), "be 0 or more and finite")
        check_options(self, "optimizer.", "eps", lambda x: 0 < x < float("inf"), "be above 0 and finite")
        check_options(self, "optimizer.", "warmup end", lambda x: 0 <= x <= 1, "lie in [0, 1]")
        check_options(self, "optimizer.", "b1 b2", lambda x: 0 <= x < 1, "lie in [0, 1)")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate of each step, counted from 0."""
    warmup = round(config.warmup * steps)
    peak = config.learning_rate
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=config.end)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])
