"""The attention of the encoder (Vaswani et al. 2017) and of the decoder (Dai et al. 2019, relative positions)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from davae_jax.model.config import Attention
from davae_jax.model.layers import dropout


def dot_product_attention(
    q_BSNH: Float[Array, "B S N H"],
    k_BSNH: Float[Array, "B S N H"],
    v_BSNH: Float[Array, "B S N H"],
    score_bias: Float[Array, "B 1 #S S"],
    *,
    dropout_rate: float,
    key: jax.Array | None,
) -> Float[Array, "B S N H"]:
    """Returns softmax(q · kᵀ / √H + score_bias) · v (Vaswani et al. 2017, section 3.2.1), as BERT uses it.

    The softmax is in float32. A key enables dropout of the attention probabilities.
    """
    scores = jnp.einsum("bqnh,bknh->bnqk", q_BSNH, k_BSNH, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(scores * q_BSNH.shape[-1] ** -0.5 + score_bias, axis=-1)
    probs = dropout(probs, dropout_rate, key).astype(v_BSNH.dtype)
    return jnp.einsum("bnqk,bknh->bqnh", probs, v_BSNH)


def relative_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N K H"],
    v: Float[Array, "B N K H"],
    r: Float[Array, "N K H"],
    r_w_bias: Float[Array, "N H"],
    r_r_bias: Float[Array, "N H"],
    mask: Bool[Array, "*#BN T K"],
    implementation: Attention = "xla",
) -> Float[Array, "B N T H"]:
    """Returns Σ_j softmax_j(score(i, j)) v_j with relative positions (Dai et al. 2019, section 3.3):

        score(i, j) = ((q_i + u) · k_j + (q_i + w) · r_{distance(i, j)}) / √H,

    where u is `r_w_bias`, w is `r_r_bias`, and distance(i, j) = (i + M) − j counts tokens from key j to query i.

    Args:
      r: a vector for each distance; r[:, j] belongs to the distance of key j from the last query.
      mask: True where a query sees a key. The kernels need the same mask for all heads.
      implementation: how it is computed (`model.config.Attention`).
    """
    if implementation == "mosaic_tpu":
        from davae_jax.model import attention_tpu

        return attention_tpu.relative_attention(q, k, v, r, r_w_bias, r_r_bias, mask)
    u, w = (bias.astype(q.dtype)[:, None] for bias in (r_w_bias, r_r_bias))
    content = jnp.einsum("bnth,bnkh->bntk", q + u, k, preferred_element_type=jnp.float32)
    position = jnp.einsum("bnth,nkh->bntk", q + w, r, preferred_element_type=jnp.float32)
    scores = (content + relative_shift(position)) * q.shape[-1] ** -0.5
    probs = masked_softmax(scores, mask).astype(v.dtype)
    return jnp.einsum("bntk,bnkh->bnth", probs, v)


def relative_shift(scores: Float[Array, "B N T K"]) -> Float[Array, "B N T K"]:
    """Moves row i left by T−1−i: columns by distance from the last query become columns by key.

    The method of Dai et al. 2019, appendix B: pad one column, reshape, drop one row. The values that wrap around land
    on keys that come after their query, which the mask hides.
    """
    B, N, T, K = scores.shape
    if T == 1:
        return scores
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (1, 0)))
    return padded.reshape(B, N, K + 1, T)[:, :, 1:].reshape(B, N, T, K)


def masked_softmax(scores: Float[Array, "... K"], mask: Bool[Array, "... K"]) -> Float[Array, "... K"]:
    """Returns the softmax over keys in float32. A masked score becomes −10000, as published, instead of −inf."""
    return jax.nn.softmax(jnp.where(mask, scores.astype(jnp.float32), -10000.0), axis=-1)


def causal_mask(T: int, K: int, *, offset, window: int | None = None, first_key=0) -> Bool[Array, "T K"]:
    """Returns which keys each query sees: those with 0 ≤ distance (< window), where distance = (i + offset) − j.

    Args:
      offset: the index of the key that belongs to the first query. It may be traced.
      window: the number of most recent keys that a query sees; None: all.
      first_key: keys before it are never seen. It may be traced.
    """
    j = jnp.arange(K)
    distance = jnp.arange(T)[:, None] + offset - j
    mask = (distance >= 0) & (j >= first_key)
    return mask if window is None else mask & (distance < window)
