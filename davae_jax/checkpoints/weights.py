"""Reads and writes the weights of Orbax checkpoints, and converts between nested and flat weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from davae_jax.checkpoints.orbax_logging import quiet_orbax
from davae_jax.checkpoints.run_folder import CONFIG_FILE, PARAMS_FOLDER, check_path
from davae_jax.model.davae import Params, split
from davae_jax.utils.errors import InputError, first_line

FlatParams = dict[str, Any]  # "decoder.layers.3.qkv_weight" → array
INV_FREQ_PATH = "decoder.inv_freq"  # the only weight that a checkpoint may lack


def load_weights(path: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> FlatParams:
    """Reads an Orbax checkpoint of weights into the targets' dtypes and shardings.

    The result lacks `decoder.inv_freq` if the checkpoint does.

    Raises:
      InputError: the checkpoint is incomplete, its arrays do not fit the targets, or values are not finite.
    """
    from orbax.checkpoint import v1 as ocp

    stored = stored_shapes(path)
    targets = {p: t for p, t in targets.items() if p in stored or p != INV_FREQ_PATH}
    problems = [f"{p} is missing" for p in targets if p not in stored]
    problems += [f"{p} is unexpected" for p in stored if p not in targets]
    problems += [
        f"{p} has shape {list(stored[p].shape)}, expected {list(t.shape)}"
        for p, t in targets.items()
        if p in stored and tuple(stored[p].shape) != t.shape
    ]
    if problems:
        raise InputError(f"{path}: does not fit {CONFIG_FILE}: {'; '.join(problems)}")
    with quiet_orbax():
        try:
            arrays = flatten(ocp.load(path.absolute(), nest(targets), checkpointable_name=_checkpointable_name(path)))
        except Exception as e:  # Orbax and TensorStore raise many types for damaged files
            raise InputError(f"{path}: cannot be read ({first_line(e)})") from e
    if not_finite := [p for p, finite in _are_finite(arrays).items() if not finite]:
        arrays_contain = "1 array contains" if len(not_finite) == 1 else f"{len(not_finite)} arrays contain"
        raise InputError(f"{path}: {arrays_contain} NaN or infinity: {', '.join(not_finite)}")
    return arrays


@jax.jit
def _are_finite(arrays: FlatParams) -> FlatParams:
    return jax.tree.map(lambda array: jnp.isfinite(array).all(), arrays)


def stored_shapes(path: Path) -> dict[str, Any]:
    """Returns an object with `shape` and `dtype` for each weight of an Orbax checkpoint, by path."""
    return flatten(_metadata(path).metadata)


def stored_metadata(path: Path) -> dict[str, Any]:
    """Returns the metadata that `save_weights` wrote."""
    return _metadata(path).custom_metadata or {}


def save_weights(path: Path, groups: Iterable[FlatParams], metadata: dict[str, Any]) -> None:
    """Writes an Orbax checkpoint, uncompressed, one group at a time, so that only one group is in memory.

    `path` must not exist, and the checkpoint is incomplete until this returns: the caller writes to a staging folder.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False
    with context, quiet_orbax():
        for group in groups:
            ocp.partial.save(path.absolute(), nest(group), custom_metadata=metadata)
        ocp.partial.finalize(path.absolute())


def flatten(params: Params) -> FlatParams:
    """Converts {"decoder": {"layers": {0: {"qkv_weight": x}}}} to {"decoder.layers.0.qkv_weight": x}."""
    flat = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{rest}": leaf for rest, leaf in flatten(value).items()})
        else:
            flat[str(name)] = value
    return flat


def unflatten(flat: FlatParams) -> Params:
    """Inverts `flatten`. Layers are keyed by int, as in the weights that `model.split` returns."""
    return nest(flat, lambda name: int(name) if name.isdigit() else name)


def nest(flat: FlatParams, key: Callable[[str], Any] = str) -> Params:
    """Converts a flat dict to nested ones; `key` converts each component of a path to a dict's key."""
    params: Params = {}
    for path, leaf in flat.items():
        *parents, name = (key(component) for component in path.split("."))
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params


def flat_params(model: nnx.Module) -> FlatParams:
    """Returns the model's weights by path."""
    return flatten(split(model)[1])


def _checkpointable_name(path: Path) -> str:
    """Returns the name of the weights in an Orbax checkpoint; those of a run also contain optimizer states."""
    return "AUTO" if path.name == PARAMS_FOLDER else PARAMS_FOLDER


def _metadata(path: Path):
    from orbax.checkpoint import v1 as ocp

    check_path(path)
    with quiet_orbax():
        try:
            metadata = ocp.metadata(path.absolute(), _checkpointable_name(path))
        except Exception as e:  # not a checkpoint, or an incomplete one
            raise InputError(f"{path}: not a complete checkpoint ({first_line(e)})") from e
    if metadata.metadata is None:
        raise InputError(f"{path}: not a complete checkpoint")
    return metadata
