"""Attention with relative positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def masked_softmax(scores: Float[Array, "... K"], visible) -> Float[Array, "... K"]:
    """Softmax over keys in float32; a hidden score is replaced by −10000, as published (not by −inf)."""
    return jax.nn.softmax(jnp.where(visible, scores.astype(jnp.float32), -10000.0), axis=-1)


def relative_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N K H"],
    v: Float[Array, "B N K H"],
    r: Float[Array, "N K H"],
    r_w_bias: Float[Array, "N H"],
    r_r_bias: Float[Array, "N H"],
    visible: Bool[Array, "*#BN T K"],
) -> Float[Array, "B N T H"]:
    """Attention with relative positions. r[:, j] belongs to the distance of key j from the last query."""
    u, w = (bias.astype(q.dtype)[:, None] for bias in (r_w_bias, r_r_bias))
    content = jnp.einsum("bnth,bnkh->bntk", q + u, k, preferred_element_type=jnp.float32)
    position = jnp.einsum("bnth,nkh->bntk", q + w, r, preferred_element_type=jnp.float32)
    scores = (content + relative_shift(position)) * q.shape[-1] ** -0.5
    probs = masked_softmax(scores, visible).astype(v.dtype)
    return jnp.einsum("bntk,bnkh->bnth", probs, v)


def relative_shift(scores: Float[Array, "B N T K"]) -> Float[Array, "B N T K"]:
    """Row i moved left by T−1−i, so that columns by distance from the last query become columns by key.

    The usual trick (Dai et al. 2019, appendix B): pad one column, reshape, drop one row. What wraps around lands on
    keys that lie after their query, which the mask hides.
    """
    B, N, T, K = scores.shape
    if T == 1:
        return scores
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (1, 0)))
    return padded.reshape(B, N, K + 1, T)[:, :, 1:].reshape(B, N, T, K)


def causal_mask(T: int, K: int, *, offset, window: int | None = None, first=0) -> Bool[Array, "T K"]:
    """Which keys each query sees: 0 ≤ distance (< window), distance = (i + offset) − j, and j not before `first`."""
    j = jnp.arange(K)
    distance = jnp.arange(T)[:, None] + offset - j
    visible = (distance >= 0) & (j >= first)
    return visible if window is None else visible & (distance < window)
