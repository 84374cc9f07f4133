"""Weight-only quantization for inference: weights that are stored in int8 or bfloat16, and products with them.

The matrices of encoder and decoder are stored in fewer bits than the model computes in. Everything else (norms, biases,
buffers, the posterior's head, the discriminator) stays as it is. In int8 each row of a weight [*out, in] has a scale
(symmetric, per output channel; an embedding has one for each id):

    scale = max |w| / 127,    values = round(w / scale),    |w − scale · values| ≤ scale / 2.

In bfloat16 there is no scale; the values are rounded to 8 significant bits. They are kept as bits (uint16), because
XLA's CPU backend cannot take a part of an array of bfloat16 without converting all of it to float32.

Only the storage changes. A product converts the stored values, which is exact in float32 and in bfloat16, adds in
float32, and multiplies by the scales afterwards, which are constant in each sum.
"""

from __future__ import annotations

import dataclasses
import os
from typing import get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from davae_jax.model.config import WeightFormat
from davae_jax.parallel.sharding import embedding_lookup
from davae_jax.utils.errors import OptionError

LARGEST = 127  # of the values, so that they are symmetric around 0
ROWS_AT_A_TIME = 64  # of a weight that is quantized; a block stays in the processor's cache
# Numbers of a weight that a CPU converts at a time (`_dot_by_blocks`), for a few rows on one or two cores: so few that
# XLA gives a block to one core, which is faster than sharing it (`benchmarks/weights.py`). Otherwise: of each core.
SMALL_BLOCK = 80_000
BLOCK_OF_EACH_CORE = 400_000  # in float32 less than a core's cache of the second level
STORED_DTYPES = {"int8": np.dtype(np.int8), "bfloat16": np.dtype(np.uint16)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight in a stored format. It takes the place of the array in an `nnx.Param`.

    values: int8, or the bits of bfloat16 as uint16.
    scale: the factor of each row of `values`; None for bfloat16.
    """

    values: Shaped[Array, "*out I"]
    scale: Float[Array, "*out"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the weight."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Returns the bytes of values and scales."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def __getitem__(self, index) -> QuantizedWeight:
        """Returns a part of the weight, selected along its first axis. `...` selects all of it."""
        return jax.tree.map(lambda array: array[index], self)

    def rows(self, ids: Int[Array, "..."]) -> QuantizedWeight:
        """Returns the rows of a table [V, D] for ids, as a weight of shape [..., D]."""
        scale = None if self.scale is None else jnp.take(self.scale, ids, axis=0)
        return QuantizedWeight(embedding_lookup(self.values, ids), scale)

    def astype(self, dtype) -> Array:
        """Returns the weight as an array of the dtype; the product of value and scale is rounded to it once."""
        values = _converted(self.values, jnp.float32)
        return (values if self.scale is None else values * self.scale[..., None]).astype(dtype)


def check_format(weights: str) -> None:
    """Raises OptionError if `weights` is not a WeightFormat."""
    if weights not in get_args(WeightFormat):
        raise OptionError("weights", f"must be one of {', '.join(get_args(WeightFormat))}, not {weights!r}")


def is_quantized(path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a weight is stored in the format that is asked for: a matrix or table of encoder or decoder.

    The posterior's head and the discriminator are small, and the KL is sensitive to the first.
    """
    is_matrix = len(shape) > 1 and path.endswith("weight")
    return is_matrix and not path.startswith(("encoder.posterior.", "discriminator."))


def quantize(array: np.ndarray, weights: WeightFormat) -> QuantizedWeight:
    """Returns a weight in the format "int8" or "bfloat16", as NumPy arrays.

    Works in blocks, so that no second copy in float32 is in memory.

    Raises:
      FloatingPointError: values are not finite in float32 or, rounded, in bfloat16.
    """
    rows = array.reshape(-1, array.shape[-1])
    values = np.empty(rows.shape, STORED_DTYPES[weights])
    scale = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        with np.errstate(over="ignore"):
            block = rows[part].astype(np.float32)
            rounded = block.astype(ml_dtypes.bfloat16) if weights == "bfloat16" else block
        if not np.isfinite(rounded).all():
            raise FloatingPointError(f"NaN, infinity, or values beyond the range of {rounded.dtype}")
        if weights == "int8":
            scale[part] = np.abs(block).max(axis=1) / LARGEST
            block /= np.where(scale[part] > 0, scale[part], 1)[:, None]
            values[part] = np.clip(np.rint(block, out=block), -LARGEST, LARGEST, out=block)
        else:
            values[part] = rounded.view(np.uint16)
    values = values.reshape(array.shape)
    return QuantizedWeight(values, scale.reshape(array.shape[:-1]) if weights == "int8" else None)


def matmul_transposed(x: Float[Array, "... I"], w: QuantizedWeight, out_dtype) -> Array:
    """Returns x · wᵀ over the last axis of both, [..., *out], added in float32 and then rounded to `out_dtype`."""
    y = lax.platform_dependent(x, w.values, cpu=_dot_by_blocks, default=_dot)
    return (y if w.scale is None else y * w.scale).astype(out_dtype)


def _dot(x: Float[Array, "... I"], values: Shaped[Array, "*out I"]) -> Array:
    """Returns x · valuesᵀ. Compilers for accelerators convert the values while they are read."""
    return jnp.tensordot(x, _converted(values, x.dtype), axes=(-1, -1), preferred_element_type=jnp.float32)


def _dot_by_blocks(x: Float[Array, "... I"], values: Shaped[Array, "*out I"]) -> Array:
    """Returns x · valuesᵀ, computed for one block of output channels after the other.

    XLA's CPU backend does not fuse a conversion into a product: the converted weight would be written to memory and
    read again. A converted block stays in the processor's cache. The barrier keeps the compiler from converting inside
    the product, where it does so element by element. The last block begins early enough to be a whole one.
    """
    x_RI = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    w_OI = values.reshape(-1, values.shape[-1])
    channels, rows, cores = len(w_OI), len(x_RI), os.cpu_count() or 1
    numbers = SMALL_BLOCK if rows <= 8 and cores <= 2 else BLOCK_OF_EACH_CORE * cores
    block = min(channels, max(1, numbers // w_OI.shape[1]))

    def multiply(i, y_OR):
        start = jnp.minimum(i * block, channels - block)
        w = _converted(lax.dynamic_slice_in_dim(w_OI, start, block), jnp.float32)
        y = jnp.einsum("oi,ri->or", lax.optimization_barrier(w), x_RI)
        return lax.dynamic_update_slice_in_dim(y_OR, y, start, axis=0)

    y_OR = lax.fori_loop(0, -(-channels // block), multiply, jnp.zeros((channels, rows), jnp.float32))
    return y_OR.T.reshape(*x.shape[:-1], *values.shape[:-1])


def _converted(values: Shaped[Array, "..."], dtype) -> Array:
    """Returns stored values as numbers. The bits of bfloat16 are the higher half of a float32's."""
    if values.dtype == jnp.uint16:
        values = lax.bitcast_convert_type(values.astype(jnp.uint32) << 16, jnp.float32)
    return values.astype(dtype)
