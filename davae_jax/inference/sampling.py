"""Computes the distribution of the next token from logits, as published:

logits / temperature → top-k → nucleus → softmax → repetition penalty on the probabilities → renormalization.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from davae_jax.model.config import check_sampling


def next_token_probs(
    logits: Float[Array, "B V"],
    previous_ids: Int[Array, "B S"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Float[Array, "B V"]:
    """Returns the probabilities of the next token in float32; each row sums to 1.

    Args:
      previous_ids: the context so far, including the beginning-of-text token and the prompt. Each occurrence of an id
        divides its probability by the penalty once.
      top_k: keeps the k most likely ids and all ties with the k-th; 0 is off.
      top_p: removes an id if the mass of the more likely ones exceeds top_p, so that the most likely one always
        remains (Holtzman et al. 2020); 0 and 1 are off.

    Raises:
      InputError: a setting is out of its range.
    """
    check_sampling(temperature, top_k, top_p, repetition_penalty)
    settings = canonical_settings(temperature, top_k, top_p, repetition_penalty)
    return _next_token_probs(jnp.asarray(logits), jnp.asarray(previous_ids), *settings.values())


def canonical_settings(
    temperature: float, top_k: int, top_p: float, repetition_penalty: float
) -> dict[str, float | int]:
    """Returns the settings with one type each, in values that float32 and int32 can represent.

    Without it, an int in place of a float would make a caller's loop compile again.
    """
    return {
        "temperature": float(temperature),
        "top_k": min(int(top_k), np.iinfo(np.int32).max),
        "top_p": max(float(top_p), 1e-30) if top_p else 0.0,  # must not underflow to 0, which means off
        "repetition_penalty": float(repetition_penalty),
    }


@jax.jit
def _next_token_probs(logits, previous_ids, temperature, top_k, top_p, repetition_penalty):
    counts = count_ids(previous_ids, jnp.ones_like(previous_ids), logits.shape[-1])
    filtered = filter_logits(logits.astype(jnp.float32) / temperature, top_k, top_p)
    return jnp.exp(penalized_log_probs(filtered, counts, repetition_penalty))


def filter_logits(logits: Float[Array, "B V"], top_k, top_p) -> Float[Array, "B V"]:
    """Applies top-k, then nucleus filtering: the logits of removed ids become −inf. Both settings may be traced.

    Neither filter sorts, which on a CPU would cost a tenth of the model's time. The ids that remain are those above a
    threshold and, of the ties with the nucleus's threshold, the first ones by id, as after a stable sort.
    """
    V = logits.shape[-1]
    floor = smallest_threshold(logits, jnp.ones_like(logits), jnp.where(top_k > 0, top_k - 1, V))
    logits = jnp.where(logits < floor, -jnp.inf, logits)

    probs = jax.nn.softmax(logits, axis=-1)
    threshold = smallest_threshold(logits, probs, jnp.where((top_p > 0) & (top_p < 1), top_p, jnp.inf))
    above, ties = logits > threshold, logits == threshold
    mass_above = jnp.where(above, probs, 0).sum(-1, keepdims=True)
    ties_before = jnp.cumsum(ties, axis=-1) - 1
    keep = above | (ties & (mass_above + ties_before * probs <= top_p)) | jnp.isnan(logits)  # NaN must not be hidden
    return jnp.where(keep, logits, -jnp.inf)


def smallest_threshold(x: Float[Array, "B V"], weights: Float[Array, "B V"], limit) -> Float[Array, "B 1"]:
    """Returns the smallest t of each row such that the weights of all x > t sum to at most `limit`; −inf if all do.

    The search is a bisection over the float32 numbers in their order; 32 steps leave one.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # rounded down, without overflow
        fits = jnp.where(x > _order_to_float(middle), weights, 0).sum(-1, keepdims=True) <= limit
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    ends = (jnp.full((x.shape[0], 1), _float_to_order(end), jnp.int32) for end in (-np.inf, np.inf))
    return _order_to_float(lax.fori_loop(0, 32, halve, tuple(ends))[1])


def _float_to_order(x: float) -> np.int32:
    """Returns an int32 for a float32, such that the order of the ints is that of the floats."""
    bits = np.float32(x).view(np.int32)
    return bits if bits >= 0 else bits ^ np.int32(0x7FFFFFFF)


def _order_to_float(order: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns the float32 of each int32: the inverse of `_float_to_order`."""
    bits = jnp.where(order >= 0, order, order ^ 0x7FFFFFFF)
    return lax.bitcast_convert_type(bits, jnp.float32)


def penalized_log_probs(logits: Float[Array, "B V"], counts: Float[Array, "B V"], penalty) -> Float[Array, "B V"]:
    """Returns log(p / penalty^count), renormalized. In logarithms, no count makes a row's total mass underflow."""
    return jax.nn.log_softmax(jax.nn.log_softmax(logits, axis=-1) - counts * jnp.log(penalty), axis=-1)


def count_ids(ids: Int[Array, "B S"], weights: Array, vocab_size: int) -> Float[Array, "B V"]:
    """Returns how often each id occurs in each row, each occurrence weighted by `weights` (0 ignores it)."""
    rows = jnp.arange(ids.shape[0])[:, None]
    return jnp.zeros((ids.shape[0], vocab_size), jnp.float32).at[rows, ids].add(weights.astype(jnp.float32))
