"""The modules that encoder and decoder are built from. Each weight is declared with its logical axes.

Letters in shapes: B batch, S encoder length, T decoder length, D width, N heads, H = D/N
head width, F feed-forward width, L latent size, V vocabulary, M memory length, K = M + T keys, P texts in a row.

Weights of linear maps are [out, in], as in the published file. On CPU, XLA's matrix-vector product reads the rows of
such a weight faster than the columns of its transpose (`benchmarks/matvec.py`); accelerators choose their own layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from davae_jax.model import quantized
from davae_jax.model.config import Remat
from davae_jax.model.quantized import QuantizedWeight
from davae_jax.parallel.sharding import Axes, embedding_lookup

INIT_STDDEV = 0.02  # of the normal initialization, as in BERT and GPT-2, if no initializer_range is given


class Buffer(nnx.Variable):
    """A stored array that is not trained (`davae.trainable_mask`) and never cast to the model's dtype."""


def param(shape: tuple[int, ...], axes: Axes, *, init, rngs: nnx.Rngs, dtype) -> nnx.Param:
    """Declares a weight: its shape, its initializer and the logical name of each axis (`parallel.sharding.RULES`)."""
    assert len(shape) == len(axes)
    return nnx.Param(init(rngs.params(), shape, dtype), axes=axes)


def residual_stddev(stddev: float, layers: int) -> float:
    """Returns stddev/√(2·layers), for the two linear maps of a layer whose output is added to its input (GPT-2)."""
    return stddev * (2 * layers) ** -0.5


class Linear(nnx.Module):
    """Computes y = W x + b over the last axis, in `dtype`."""

    def __init__(self, d_in: int, d_out: int, axes: Axes, *, rngs, dtype, param_dtype, stddev=INIT_STDDEV, bias=True):
        normal = nnx.initializers.normal(stddev)
        self.weight = param((d_out, d_in), axes, init=normal, rngs=rngs, dtype=param_dtype)
        self.bias = (
            param((d_out,), axes[:1], init=nnx.initializers.zeros, rngs=rngs, dtype=param_dtype) if bias else None
        )
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = matmul_transposed(x.astype(self.dtype), self.weight[...])
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis (Ba et al. 2016), in float32 for every dtype of the model."""

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
    """A table with a vector for each id."""

    def __init__(
        self, rows: int, width: int, axes: Axes = ("vocab", "embed"), *, rngs, dtype, param_dtype, stddev=INIT_STDDEV
    ):
        self.weight = param((rows, width), axes, init=nnx.initializers.normal(stddev), rngs=rngs, dtype=param_dtype)
        self.dtype = dtype

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        weight = self.weight[...]
        rows = weight.rows(ids) if isinstance(weight, QuantizedWeight) else embedding_lookup(weight, ids)
        return rows.astype(self.dtype)

    def logits(self, h: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns h · Eᵀ, the logits of a tied output embedding, accumulated in float32."""
        return matmul_transposed(h.astype(self.dtype), self.weight[...], out_dtype=jnp.float32)


def matmul_transposed(x: Float[Array, "... I"], w: Float[Array, "*out I"] | QuantizedWeight, out_dtype=None) -> Array:
    """Returns x · wᵀ over the last axis of both, [..., *out], computed in the dtype of x.

    The axes of w are not merged, so each keeps its sharding.

    For up to 8 rows (decoding token by token) the product is computed with the weight on the left: on CPU, XLA then
    reads it from memory about twice as fast (`benchmarks/matvec.py`). The numbers are the same. The barrier keeps the
    compiler from folding the transpose back into the product.
    """
    if isinstance(w, QuantizedWeight):
        return quantized.matmul_transposed(x, w, out_dtype or x.dtype)
    rows, w = x.size // x.shape[-1], w.astype(x.dtype)
    if rows > 8:
        return jnp.tensordot(x, w, axes=(-1, -1), preferred_element_type=out_dtype)
    w_OI, x_RI = w.reshape(-1, w.shape[-1]), x.reshape(rows, x.shape[-1])
    y = jnp.einsum("oi,ri->or", w_OI, x_RI, preferred_element_type=out_dtype)
    return lax.optimization_barrier(y).T.reshape(*x.shape[:-1], *w.shape[:-1])


def dropout(x: Float[Array, "..."], rate: float, key: jax.Array | None) -> Float[Array, "..."]:
    """Applies inverted dropout (Srivastava et al. 2014); without a key, in evaluation, it returns x."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def apply_remat(layer: Callable, remat: Remat) -> Callable:
    """Returns the layer with gradient checkpointing: the backward pass recomputes activations that are not saved.

    remat: "none" saves everything, "dots" the results of products with weights, "full" only the layer's input.
    """
    match remat:
        case "none":
            return layer
        case "dots":
            return jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        case "full":
            return jax.checkpoint(layer)


def split_keys(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    """Returns n independent keys, or n times None if there is no key."""
    return [None] * n if key is None else list(jax.random.split(key, n))


class Segments(NamedTuple):
    """Which tokens belong to which text, in rows that contain up to P texts in sequence.

    segment_ids: the number of each token's text in its row, 1 … P; 0 is padding.
    starts: the index of each text's first token.
    """

    segment_ids: Int[Array, "B S"]
    starts: Int[Array, "B P"]

    def positions(self) -> Int[Array, "B S"]:
        """Returns the position of each token in its text, from 0; 0 for padding."""
        starts = gather_per_token(self.starts[..., None], self.segment_ids)[..., 0]
        return jnp.where(self.segment_ids > 0, jnp.arange(self.segment_ids.shape[1]) - starts, 0)


def gather_per_token(per_text: Float[Array, "B P D"], segment_ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Returns, for each token, the vector of its text; padding gets the vector of the row's first text."""
    return jnp.take_along_axis(per_text, jnp.maximum(segment_ids - 1, 0)[..., None], axis=1)


def same_segment(segment_ids: Int[Array, "B S"]) -> Bool[Array, "B 1 S S"]:
    """Returns a mask that is True where query and key belong to the same text."""
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
