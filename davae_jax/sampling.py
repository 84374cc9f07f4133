"""From logits to the distribution of the next token, as published.

logits / temperature → top-k → nucleus → softmax → repetition penalty on the probabilities → renormalised.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from davae_jax.config import check_sampling


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
    return _next_token_probs(
        jnp.asarray(logits),
        jnp.asarray(previous_ids),
        float(temperature),
        int(top_k),
        float(top_p),
        float(repetition_penalty),
    )


@jax.jit
def _next_token_probs(logits, previous_ids, temperature, top_k, top_p, repetition_penalty):
    counts = count_ids(previous_ids, jnp.ones_like(previous_ids), logits.shape[-1])
    filtered = filter_logits(logits.astype(jnp.float32) / temperature, top_k, top_p)
    return jnp.exp(penalized_log_probs(filtered, counts, repetition_penalty))


def filter_logits(logits: Float[Array, "B V"], top_k, top_p) -> Float[Array, "B V"]:
    """Top-k, then nucleus (Holtzman et al. 2020): what is filtered out becomes −inf. Both settings may be traced.

    One sort of the values serves both filters; the ids' order is not needed, because what stays is all above a cut and,
    among those equal to it, the first ones by id (as a stable sort would leave them).
    """
    V = logits.shape[-1]
    ranked = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    kth = jnp.take(ranked, jnp.clip(top_k, 1, V) - 1, axis=-1)[:, None]
    floor = jnp.where(top_k > 0, kth, -jnp.inf)
    logits = jnp.where(logits >= floor, logits, -jnp.inf)
    ranked = jnp.where(ranked >= floor, ranked, -jnp.inf)

    mass = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    mass_before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
    kept = jnp.where((top_p > 0) & (top_p < 1), (mass_before <= top_p).sum(-1), V)
    cut = jnp.take_along_axis(ranked, kept[:, None] - 1, axis=-1)
    above, ties = logits > cut, logits == cut
    room = kept[:, None] - above.sum(-1, keepdims=True)
    stays = above | (ties & (jnp.cumsum(ties, axis=-1) <= room))
    return jnp.where(stays, logits, -jnp.inf)


def penalized_log_probs(logits: Float[Array, "B V"], counts: Float[Array, "B V"], penalty) -> Float[Array, "B V"]:
    """log of p / penalty^count, renormalised. In logarithms no count is large enough to lose a row's whole mass."""
    return jax.nn.log_softmax(jax.nn.log_softmax(logits, axis=-1) - counts * jnp.log(penalty), axis=-1)


def count_ids(ids: Int[Array, "B S"], weights: Array, vocab_size: int) -> Float[Array, "B V"]:
    """How often each id occurs in its row; `weights` 0 leaves a place out."""
    rows = jnp.arange(ids.shape[0])[:, None]
    return jnp.zeros((ids.shape[0], vocab_size), jnp.float32).at[rows, ids].add(weights.astype(jnp.float32))
