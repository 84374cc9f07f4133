"""How a run's arrays lie over the devices: one table from logical axis names to mesh axes.

Every weight names its axes where it is declared (`layers.param`), every activation where it is made (`constrain`).
An axis is split only where the mesh has the axis and its size divides; otherwise it stays whole. The published decoder
has 25 heads, which divide by neither 2 nor 4: there the 1600-wide axis that the heads are cut from, the 6400-wide
feed-forward axis and the 50048 words are split, and the attention between them is computed whole on each device of the
`tensor` axis. Where the heads do divide, they stay split through the attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from davae_jax.parallel.config import MeshConfig
from davae_jax.utils.errors import InputError

Axes = tuple[str | None, ...]

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "group": ("data",),  # the batch, of what the devices of fsdp compute together
    "embed": ("fsdp",),  # the model's width: of weights, and of looked-up rows until they are exchanged
    "heads": ("tensor",),  # all heads' outputs side by side
    "head": ("tensor",),  # the heads one by one
    "mlp": ("tensor",),  # the feed-forward width
    "vocab": ("tensor",),  # rows of the embedding tables, and the logits they make
}


def make_mesh(config: MeshConfig, batch_size: int, accumulate: int = 1) -> Mesh:
    """All devices, of all processes. The compiler propagates shardings through the model (AxisType.Auto).

    accumulate: parts of the batch that are computed one after the other; each is divided over the devices.

    Raises:
      InputError: the devices or the batch cannot be divided so (exit code 2).
    """
    return jax.make_mesh(*_mesh_axes(config, batch_size, accumulate, jax.device_count()))


def make_abstract_mesh(config: MeshConfig, batch_size: int, devices: int, accumulate: int = 1) -> AbstractMesh:
    """The mesh of a machine that is not there, of so many devices. Raises as `make_mesh`."""
    return AbstractMesh(*_mesh_axes(config, batch_size, accumulate, devices))


def _mesh_axes(config: MeshConfig, batch_size: int, accumulate: int, devices: int) -> tuple:
    """Sizes, names and types of the axes."""
    shape = config.shape(devices)
    parts = math.prod(shape[axis] for axis in RULES["batch"])
    if batch_size % (parts * accumulate):
        said = f"--batch-size {batch_size}: does not divide into the mesh's {parts} parts"
        raise InputError(said + (f" times --accumulate {accumulate}" if accumulate > 1 else ""), exit_code=2)
    return tuple(shape.values()), tuple(shape), (AxisType.Auto,) * len(shape)


def partition_spec(axes: Axes, shape: tuple[int, ...], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """Where each axis of an array is split. No mesh axis splits two of them: the first that fits has it."""
    spec, used = [], set()
    for name, size in zip(axes, shape, strict=True):
        over = tuple(axis for axis in RULES[name] if axis in mesh_shape and axis not in used) if name else ()
        fits = over and size % math.prod(mesh_shape[axis] for axis in over) == 0
        spec.append((over if len(over) > 1 else over[0]) if fits else None)
        used |= set(over) if fits else set()
    return PartitionSpec(*spec)


def weight_sharding(axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh | None) -> jax.sharding.Sharding:
    """The sharding of one weight; without a mesh, the first device alone."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if len(shape) == 1:  # over fsdp vectors stay whole: their bytes are not worth hundreds of small gatherings a step
        axes = tuple(None if name == "embed" else name for name in axes)
    # Whatever axis types the caller's mesh was made with: the model's own operations name no shardings.
    mesh = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return NamedSharding(mesh, partition_spec(axes, shape, mesh.shape))


def shard_batch(arrays: Any, params: Any) -> Any:
    """Lays arrays [B, …] over the mesh that the weights lie on. Of weights on one device, gives them as they are."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return arrays
    mesh = sharding.mesh

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, partition_spec(("batch",), x.shape[:1], mesh.shape)))

    return jax.tree.map(place, arrays)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how an activation lies over the mesh that `jax.set_mesh` has set; without one, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh.shape))


def embedding_lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table [V, D] whose width is split over fsdp, [B, T, D] with B split over data and fsdp.

    A device looks its own columns up for all texts of its fsdp group, and the group exchanges them. Left to itself the
    compiler gathers the gradient of the whole batch on every device.
    """
    fsdp = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1)
    if ids.ndim < 2 or table.shape[1] % fsdp:
        return jnp.take(table, ids, axis=0)
    rest = (None,) * (ids.ndim - 1)
    x = jnp.take(table, constrain(ids, "group", *rest), axis=0)
    return constrain(constrain(x, "group", *rest, "embed"), "batch", *rest, None)
