"""Weights on disk: Orbax checkpoints, read into dtypes and shardings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from davae_jax.checkpoints.orbax_logging import quiet_orbax
from davae_jax.checkpoints.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, PARAMS_FOLDER
from davae_jax.model.davae import Params, split
from davae_jax.utils.errors import InputError, first_line

FlatParams = dict[str, Any]  # "decoder.layers.3.qkv_weight" → array


def load_weights(path: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> FlatParams:
    """Reads an Orbax checkpoint of weights into the targets' dtypes and shardings. `decoder.inv_freq` may be absent.

    Raises:
      InputError: no complete checkpoint, arrays that do not fit the targets, or values that are not finite.
    """
    from orbax.checkpoint import v1 as ocp

    stored = stored_shapes(path)
    wanted = {p: t for p, t in targets.items() if p in stored or p != "decoder.inv_freq"}
    problems = [f"{p} is missing" for p in wanted if p not in stored]
    problems += [f"{p} is unknown" for p in stored if p not in targets]
    problems += [
        f"{p} is {list(stored[p].shape)}, not {list(t.shape)}"
        for p, t in wanted.items()
        if p in stored and tuple(stored[p].shape) != t.shape
    ]
    if problems:
        raise InputError(f"{path}: does not fit {CONFIG_FILE}: {'; '.join(problems)}")
    with quiet_orbax():
        try:
            arrays = flatten(ocp.load(path.absolute(), nest(wanted), checkpointable_name=_checkpointable_name(path)))
        except Exception as e:  # Orbax and TensorStore raise many types for damaged files
            raise InputError(f"{path}: cannot be read ({first_line(e)})") from e
    if bad := [p for p, finite in _are_finite(arrays).items() if not finite]:
        raise InputError(f"{path}: {len(bad)} NaN or infinite: {', '.join(bad)}")
    return arrays


@jax.jit
def _are_finite(arrays: FlatParams) -> FlatParams:
    return jax.tree.map(lambda array: jnp.isfinite(array).all(), arrays)


def stored_shapes(path: Path) -> dict[str, Any]:
    """Shape and dtype of each array of an Orbax checkpoint of weights, by path."""
    return flatten(_metadata(path).metadata)


def stored_metadata(path: Path) -> dict[str, Any]:
    """What `save_weights` was given as `extras`."""
    return _metadata(path).custom_metadata or {}


def save_weights(path: Path, groups: Iterable[FlatParams], extras: dict[str, Any]) -> None:
    """Writes an Orbax checkpoint group by group, uncompressed, so that no more than a group is held in buffers.

    The caller gives a `path` that does not exist, in a folder of its own: nothing is finished until this returns.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False
    with context, quiet_orbax():
        for group in groups:
            ocp.partial.save(path.absolute(), nest(group), custom_metadata=extras)
        ocp.partial.finalize(path.absolute())


def flatten(params: Params) -> FlatParams:
    """{"decoder": {"layers": {0: {"qkv_weight": x}}}} → {"decoder.layers.0.qkv_weight": x}"""
    flat = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{rest}": leaf for rest, leaf in flatten(value).items()})
        else:
            flat[str(name)] = value
    return flat


def unflatten(flat: FlatParams) -> Params:
    """The inverse of `flatten`: the layout `model.split` gives, where layers are numbered by int."""
    return nest(flat, lambda part: int(part) if part.isdigit() else part)


def nest(flat: FlatParams, key=str) -> Params:
    params: Params = {}
    for path, leaf in flat.items():
        *parents, name = (key(part) for part in path.split("."))
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params


def _checkpointable_name(path: Path) -> str:
    """Which part of an Orbax checkpoint the weights are; a run's hold the optimizers' states beside them."""
    return PARAMS_FOLDER if path.parent.name == CHECKPOINTS_FOLDER else "AUTO"


def _metadata(path: Path):
    from orbax.checkpoint import v1 as ocp

    with quiet_orbax():
        try:
            metadata = ocp.metadata(path.absolute(), _checkpointable_name(path))
        except Exception as e:  # not a checkpoint, or one that was cut off
            raise InputError(f"{path}: not a complete checkpoint ({first_line(e)})") from e
    if metadata.metadata is None:
        raise InputError(f"{path}: not a complete checkpoint")
    return metadata


def flat_params(model: nnx.Module) -> FlatParams:
    """The model's weights by path."""
    return flatten(split(model)[1])
