"""From logits to the distribution of the next token, as published.

logits / temperature → top-k → nucleus → softmax → repetition penalty on the probabilities → renormalised.
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
    """Probabilities of the next token, float32, each row summing to 1.

    Args:
      previous_ids: the context so far, beginning-of-text and prompt included; each occurrence divides an id's
        probability by the penalty once more.
      top_k: keeps the k most likely ids and all ties with the k-th; 0 is off.
      top_p: an id goes once the mass of the more likely ones exceeds top_p; the best always stays; 0 and 1 are off.

    Raises:
      InputError: a setting out of its range.
    """
    check_sampling(temperature, top_k, top_p, repetition_penalty)
    settings = canonical_settings(temperature, top_k, top_p, repetition_penalty)
    return _next_token_probs(jnp.asarray(logits), jnp.asarray(previous_ids), *settings.values())


def canonical_settings(
    temperature: float, top_k: int, top_p: float, repetition_penalty: float
) -> dict[str, float | int]:
    """The settings as numbers that keep their meaning in float32 and int32, one type each.

    A whole number where a fraction stood before would compile a caller's loop anew.
    """
    return {
        "temperature": float(temperature),
        "top_k": min(int(top_k), np.iinfo(np.int32).max),
        "top_p": max(float(top_p), 1e-30) if top_p else 0.0,  # not so small that it became 0, which is off
        "repetition_penalty": float(repetition_penalty),
    }


@jax.jit
def _next_token_probs(logits, previous_ids, temperature, top_k, top_p, repetition_penalty):
    counts = count_ids(previous_ids, jnp.ones_like(previous_ids), logits.shape[-1])
    filtered = filter_logits(logits.astype(jnp.float32) / temperature, top_k, top_p)
    return jnp.exp(penalized_log_probs(filtered, counts, repetition_penalty))


def filter_logits(logits: Float[Array, "B V"], top_k, top_p) -> Float[Array, "B V"]:
    """Top-k, then nucleus (Holtzman et al. 2020): what is filtered out becomes −inf. Both settings may be traced.

    Neither needs a sort, which on a CPU costs as much as a tenth of the whole model: what stays is all above a cut and,
    of the nucleus's ties with it, the first ones by id (as a stable sort would leave them).
    """
    V = logits.shape[-1]
    floor = smallest_threshold(logits, jnp.ones_like(logits), jnp.where(top_k > 0, top_k - 1, V))
    logits = jnp.where(logits < floor, -jnp.inf, logits)

    probs = jax.nn.softmax(logits, axis=-1)
    cut = smallest_threshold(logits, probs, jnp.where((top_p > 0) & (top_p < 1), top_p, jnp.inf))
    above, ties = logits > cut, logits == cut
    mass_above = jnp.where(above, probs, 0).sum(-1, keepdims=True)
    ties_before = jnp.cumsum(ties, axis=-1) - 1
    stays = above | (ties & (mass_above + ties_before * probs <= top_p)) | jnp.isnan(logits)  # a fault must show
    return jnp.where(stays, logits, -jnp.inf)


def smallest_threshold(x: Float[Array, "B V"], weights: Float[Array, "B V"], limit) -> Float[Array, "B 1"]:
    """The smallest value in a row above which the weights sum to `limit` at most; −inf if all of them do.

    Bisection over the float32 numbers themselves, in their order: 32 halvings leave one.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # rounded down, without overflow
        fits = jnp.where(x > _order_to_float(middle), weights, 0).sum(-1, keepdims=True) <= limit
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    ends = (jnp.full((x.shape[0], 1), _float_to_order(end), jnp.int32) for end in (-np.inf, np.inf))
    return _order_to_float(lax.fori_loop(0, 32, halve, tuple(ends))[1])


def _float_to_order(x: float) -> np.int32:
    """The place of a float32 among all of them: a smaller number has a smaller place."""
    bits = np.float32(x).view(np.int32)
    return bits if bits >= 0 else bits ^ np.int32(0x7FFFFFFF)


def _order_to_float(order: Int[Array, "..."]) -> Float[Array, "..."]:
    bits = jnp.where(order >= 0, order, order ^ 0x7FFFFFFF)
    return lax.bitcast_convert_type(bits, jnp.float32)


def penalized_log_probs(logits: Float[Array, "B V"], counts: Float[Array, "B V"], penalty) -> Float[Array, "B V"]:
    """log of p / penalty^count, renormalised. In logarithms no count is large enough to lose a row's whole mass."""
    return jax.nn.log_softmax(jax.nn.log_softmax(logits, axis=-1) - counts * jnp.log(penalty), axis=-1)


def count_ids(ids: Int[Array, "B S"], weights: Array, vocab_size: int) -> Float[Array, "B V"]:
    """How often each id occurs in its row; `weights` 0 leaves a place out."""
    rows = jnp.arange(ids.shape[0])[:, None]
    return jnp.zeros((ids.shape[0], vocab_size), jnp.float32).at[rows, ids].add(weights.astype(jnp.float32))
