"""Defines how arrays are sharded over devices: a table of rules from logical axis names to mesh axes.

A weight names its logical axes where it is declared (`layers.param`), an activation where it is computed (`constrain`).
An array axis is sharded only if the mesh has the axes of its rule and their product divides its size; otherwise it is
replicated. The published decoder has 25 heads, which neither 2 nor 4 devices divide. Tensor parallelism then shards the
1600 outputs of the heads, the feed-forward axis of 6400 and the vocabulary of 50048, and each device of the `tensor`
axis computes all of the attention between them. If the heads do divide, they stay sharded through the attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from davae_jax.parallel.config import MeshConfig
from davae_jax.utils.errors import OptionError

Axes = tuple[str | None, ...]

# Mesh axes: "data" replicates the weights and shards the batch (data parallelism); "fsdp" shards the weights, the
# optimizer's state and the batch (fully sharded data parallelism); "tensor" shards each layer (tensor parallelism).
RULES: Mapping[str, tuple[str, ...]] = {
    # Axes of activations.
    "batch": ("data", "fsdp"),  # B: texts, or rows of texts
    "group": ("data",),  # B, where the devices of an fsdp group compute the same texts (`embedding_lookup`)
    "head": ("tensor",),  # N: an axis with an element for each head
    # Axes of weights, and of the activations that they make.
    "embed": ("fsdp",),  # D: the model's width; of an activation only in `embedding_lookup`
    "heads": ("tensor",),  # N·H: the outputs of all heads in one axis
    "mlp": ("tensor",),  # F: the feed-forward width
    "vocab": ("tensor",),  # V: rows of the embedding tables, and logits
    "layer": (),  # the layers of a stack (`model.stack`): each device has its part of every layer
}


def make_mesh(config: MeshConfig, batch_size: int, accumulate: int = 1) -> Mesh:
    """Returns a mesh of all devices of all processes. The compiler propagates shardings through it (AxisType.Auto).

    Args:
      accumulate: number of micro-batches per step; each is sharded.

    Raises:
      InputError: the mesh does not fit the number of devices or the batch size (exit code 2).
    """
    return jax.make_mesh(*_mesh_axes(config, batch_size, accumulate, jax.device_count()))


def make_abstract_mesh(config: MeshConfig, batch_size: int, devices: int, accumulate: int = 1) -> AbstractMesh:
    """Returns a mesh of this number of devices, which need not exist. Raises as `make_mesh`."""
    return AbstractMesh(*_mesh_axes(config, batch_size, accumulate, devices))


def _mesh_axes(config: MeshConfig, batch_size: int, accumulate: int, devices: int) -> tuple:
    """Returns the sizes, names and types of the axes. Raises as `make_mesh`."""
    shape = config.shape(devices)
    shards = math.prod(shape[axis] for axis in RULES["batch"])
    if batch_size % (shards * accumulate):
        factors = "data × fsdp × accumulate" if accumulate > 1 else "data × fsdp"
        raise OptionError("--batch-size", f"must be a multiple of {factors} = {shards * accumulate}, not {batch_size}")
    return tuple(shape.values()), tuple(shape), (AxisType.Auto,) * len(shape)


def partition_spec(axes: Axes, shape: tuple[int, ...], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """Returns the spec of an array by `RULES`. A mesh axis shards at most one array axis: the first that it divides."""
    spec, used = [], set()
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = tuple(axis for axis in RULES[name] if axis in mesh_shape and axis not in used) if name else ()
        fits = mesh_axes and size % math.prod(mesh_shape[axis] for axis in mesh_axes) == 0
        spec.append((mesh_axes if len(mesh_axes) > 1 else mesh_axes[0]) if fits else None)
        used |= set(mesh_axes) if fits else set()
    return PartitionSpec(*spec)


def weight_sharding(axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh | None) -> jax.sharding.Sharding:
    """Returns the sharding of a weight; without a mesh, it is on the first device."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    # Vectors are not sharded over fsdp: they are small, and hundreds of small all-gathers are slow.
    if len(shape) - axes.count("layer") == 1:
        axes = tuple(None if name == "embed" else name for name in axes)
    # The model's operations name no output shardings, so the axes must be Auto, even if the caller's mesh differs.
    mesh = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return NamedSharding(mesh, partition_spec(axes, shape, mesh.shape))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a training batch's arrays: their rows, over the axes of the batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def shard_batch(arrays: Any, params: Any) -> Any:
    """Shards arrays [B, …] over the mesh of the weights. If the weights are on one device, returns them unchanged."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return arrays
    mesh = sharding.mesh

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, partition_spec(("batch",), x.shape[:1], mesh.shape)))

    return jax.tree.map(place, arrays)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation, by `RULES`, on the mesh of `jax.set_mesh`; without one, returns x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh.shape))


def embedding_lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the rows of a table [V, D], D sharded over fsdp, for ids [B, T], B sharded over data and fsdp.

    Each device looks up its columns for all texts of its fsdp group, and the group exchanges them. Without the
    constraints, the compiler gathers the gradient of the whole batch on every device.
    """
    fsdp = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1)
    if ids.ndim < 2 or table.shape[1] % fsdp:
        return jnp.take(table, ids, axis=0)
    rest = (None,) * (ids.ndim - 1)
    x = jnp.take(table, constrain(ids, "group", *rest), axis=0)
    return constrain(constrain(x, "group", *rest, "embed"), "batch", *rest, None)
