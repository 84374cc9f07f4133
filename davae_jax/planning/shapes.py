"""Makes the abstract arrays of a planned run (its state and its batch), and counts their bytes per device."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from davae_jax.data.batches import Batch
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import DAVAE, abstract_training_model
from davae_jax.training.config import TrainConfig
from davae_jax.training.flops import longest_rows
from davae_jax.training.state import TrainState, abstract_state

FLOAT32_BYTES = 4


@functools.lru_cache(maxsize=16)
def cached_abstract_state(config: TrainConfig, mesh: AbstractMesh) -> TrainState:
    """Returns `abstract_state` of the config's model."""
    return abstract_state(_cached_abstract_model(config.model, config.dtype), config, mesh)


@functools.lru_cache(maxsize=4)
def _cached_abstract_model(config: DAVAEConfig, dtype: str) -> DAVAE:
    return abstract_training_model(config, dtype=dtype)


def batch_shapes(config: TrainConfig, rows: int) -> Batch:
    """Returns the abstract batch of `rows` texts of the longest lengths."""
    S, T = longest_rows(config)
    ids = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return Batch(ids((rows, S)), ids((rows, T)), ids((rows, T)), ids((rows, 1)))


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes of abstract arrays with shardings on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
