"""Where each weight lies on a device mesh: one table from logical axis names to mesh axes.

Each weight names its axes where it is declared (`layers.param`). An axis is split only where the mesh axis exists and
divides it; otherwise it stays whole. The published decoder has 25 heads, which divide by neither 2 nor 4, so what is
split is the 1600-wide axis that the heads are cut from.
"""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from davae_jax.layers import Axes

RULES = {
    "embed": "fsdp",  # the model's width
    "heads": "tensor",  # all heads' outputs side by side
    "mlp": "tensor",  # the feed-forward width
    "vocab": "tensor",  # rows of the embedding tables
}


def partition_spec(axes: Axes, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The split of one weight over the mesh."""
    spec = []
    for name, size in zip(axes, shape, strict=True):
        mesh_axis = RULES[name] if name else None
        fits = mesh_axis in mesh.shape and size % mesh.shape[mesh_axis] == 0
        spec.append(mesh_axis if fits and mesh_axis not in spec else None)
    return PartitionSpec(*spec)


def weight_sharding(axes: Axes, shape: tuple[int, ...], mesh: Mesh | None) -> jax.sharding.Sharding:
    """The sharding of one weight; without a mesh, the first device alone."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    # The compiler propagates shardings through the model itself, whatever axis types the caller's mesh was made with.
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))
