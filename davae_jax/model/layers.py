"""The few modules both halves of the model are made of, and how each weight is laid out over a mesh.

Letters used for shapes in the whole project: B batch, S encoder length, T decoder length, D width, N heads, H = D/N
head width, F feed-forward width, L latent size, V vocabulary, M memory length, K = M + T keys, P texts in a row.

Weights of linear maps are [out, in], as in the published file. XLA's CPU matrix-vector product reads rows of such a
weight faster than columns of its transpose (`benchmarks/matvec.py`); accelerators choose their own layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from davae_jax.model.config import Remat
from davae_jax.parallel.sharding import Axes, embedding_lookup

INIT_STDDEV = 0.02  # normal init of every weight, as in BERT and GPT-2; a config's initializer_range may say otherwise


class Buffer(nnx.Variable):
    """A stored array that is not trained (`davae.trainable_mask`) and never cast to the model's dtype."""


def param(shape: tuple[int, ...], axes: Axes, *, init, rngs: nnx.Rngs, dtype) -> nnx.Param:
    """Declares one weight: shape, initializer and the logical name of each axis (`davae_jax.sharding`) together."""
    assert len(shape) == len(axes)
    return nnx.Param(init(rngs.params(), shape, dtype), axes=axes)


def residual_stddev(stddev: float, layers: int) -> float:
    """Of the two maps of a layer that write to the residual stream: 1/√(2·layers) of the others', as in GPT-2."""
    return stddev * (2 * layers) ** -0.5


class Linear(nnx.Module):
    """y = W x + b over the last axis, computed in `dtype`."""

    def __init__(self, d_in: int, d_out: int, axes: Axes, *, rngs, dtype, param_dtype, stddev=INIT_STDDEV, bias=True):
        normal = nnx.initializers.normal(stddev)
        self.weight = param((d_out, d_in), axes, init=normal, rngs=rngs, dtype=param_dtype)
        self.bias = (
            param((d_out,), axes[:1], init=nnx.initializers.zeros, rngs=rngs, dtype=param_dtype) if bias else None
        )
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = matmul_transposed(x.astype(self.dtype), self.weight[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, in float32 whatever the model's dtype."""

    def __init__(self, width: int, *, eps: float, rngs, dtype, param_dtype):
        self.weight = param((width,), ("embed",), init=nnx.initializers.ones, rngs=rngs, dtype=param_dtype)
        self.bias = param((width,), ("embed",), init=nnx.initializers.zeros, rngs=rngs, dtype=param_dtype)
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        y = x * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(self.dtype)


class Embedding(nnx.Module):
    """A table of vectors, one a row."""

    def __init__(
        self, rows: int, width: int, axes: Axes = ("vocab", "embed"), *, rngs, dtype, param_dtype, stddev=INIT_STDDEV
    ):
        self.weight = param((rows, width), axes, init=nnx.initializers.normal(stddev), rngs=rngs, dtype=param_dtype)
        self.dtype = dtype

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        return embedding_lookup(self.weight[...], ids).astype(self.dtype)

    def logits(self, h: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """h · Eᵀ, accumulated and returned in float32 (tied output embedding)."""
        return matmul_transposed(h.astype(self.dtype), self.weight[...].astype(self.dtype), out_dtype=jnp.float32)


def matmul_transposed(x: Float[Array, "... I"], w: Float[Array, "*out I"], out_dtype=None) -> Array:
    """x · wᵀ over the last axis of both, [..., *out]: the axes of w stay apart, so that each keeps its sharding.

    For a few rows (decoding token by token) the weight goes on the left: on CPU, XLA then streams it from memory about
    twice as fast at 2 to 8 rows (`benchmarks/matvec.py`). The numbers are the same. The barrier keeps the compiler from
    folding the transpose back into the product.
    """
    rows = x.size // x.shape[-1]
    if rows > 8:
        return jnp.tensordot(x, w, axes=(-1, -1), preferred_element_type=out_dtype)
    w_OI, x_RI = w.reshape(-1, w.shape[-1]), x.reshape(rows, x.shape[-1])
    y = jnp.einsum("oi,ri->or", w_OI, x_RI, preferred_element_type=out_dtype)
    return lax.optimization_barrier(y).T.reshape(*x.shape[:-1], *w.shape[:-1])


def dropout(x: Float[Array, "..."], rate: float, key: jax.Array | None) -> Float[Array, "..."]:
    """Inverted dropout; without a key (evaluation) the identity."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def apply_remat(layer: Callable, remat: Remat) -> Callable:
    """none: all is kept. dots: the results of products with weights. full: the layer's input alone."""
    match remat:
        case "none":
            return layer
        case "dots":
            return jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        case "full":
            return jax.checkpoint(layer)


def split_keys(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    """n independent keys, or n times None where there is no key."""
    return [None] * n if key is None else list(jax.random.split(key, n))


class Segments(NamedTuple):
    """Where each text is in rows that hold up to P of them, one behind the other."""

    segment_ids: Int[Array, "B S"]  # 1 … P, the number of a token's text; 0 is padding
    starts: Int[Array, "B P"]  # each text's first place

    def positions(self) -> Int[Array, "B S"]:
        """Each token's place in its own text, from 0; padding's is 0."""
        starts = gather_per_token(self.starts[..., None], self.segment_ids)[..., 0]
        return jnp.where(self.segment_ids > 0, jnp.arange(self.segment_ids.shape[1]) - starts, 0)


def gather_per_token(of_texts: Float[Array, "B P D"], segments: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """What each token's text has; padding gets the first text's."""
    return jnp.take_along_axis(of_texts, jnp.maximum(segments - 1, 0)[..., None], axis=1)


def same_segment(segments: Int[Array, "B S"]) -> Bool[Array, "B 1 S S"]:
    """Which keys are of a query's own text."""
    return (segments[:, :, None] == segments[:, None, :])[:, None]
