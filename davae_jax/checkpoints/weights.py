"""Reads and writes the weights of Orbax checkpoints, and converts between nested and flat weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from davae_jax.checkpoints.orbax_logging import quiet_orbax
from davae_jax.checkpoints.run_folder import CONFIG_FILE, PARAMS_FOLDER, check_path, is_run_checkpoint, is_step
from davae_jax.checkpoints.sums import SUMS_FILE, array_sum, array_sums, check_files, write_sums
from davae_jax.model.davae import Params, split
from davae_jax.model.quantized import QuantizedWeight
from davae_jax.utils.errors import InputError, first_line
from davae_jax.utils.json_files import json_sum
from davae_jax.utils.signals import interrupt_at_end

FlatParams = dict[str, Any]  # "decoder.layers.3.qkv_weight" → array
INV_FREQ_PATH = "decoder.inv_freq"  # the only weight that a checkpoint may lack
SUMS = "sums"  # key of the metadata: of a run's checkpoint, the sums of its arrays; of parameters, the file of the sums
EXTRA_STATE, EXTRA_STATE_SUM = "remembered", "remembered_sum"  # further keys of a run's checkpoint
READ_BYTES = 1 << 28  # of arrays that `iterate_arrays` reads together
WEIGHT_BYTES = 1 << 25  # the same of `iterate_weights`, whose caller has little memory


def load_weights(path: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> FlatParams:
    """Reads an Orbax checkpoint of weights into the targets' dtypes and shardings.

    The result lacks `decoder.inv_freq` if the checkpoint does. Sums are checked if the checkpoint has them.

    Raises:
      InputError: the checkpoint is incomplete or damaged, its arrays do not fit the targets, or values are not finite.
    """
    from orbax.checkpoint import v1 as ocp

    stored, sums = _checked_shapes(path, targets), _run_sums(path)
    targets = {p: t for p, t in targets.items() if p in stored or p != INV_FREQ_PATH}
    with quiet_orbax():
        try:
            read = {p: _stored(t, stored[p].dtype) for p, t in targets.items()} if sums else targets
            arrays = flatten(ocp.load(path.absolute(), nest(read), checkpointable_name=_checkpointable_name(path)))
        except Exception as e:  # Orbax and TensorStore raise many types for damaged files
            _check_exists(path)
            raise InputError(f"{path}: cannot be read ({first_line(e)})") from e
    if sums:
        computed = jax.device_get(array_sums(arrays))
        if differing := [p for p in computed if int(computed[p]) != sums.get(f"{PARAMS_FOLDER}.{p}")]:
            raise InputError(f"{path}: checksum mismatch in {len(differing)} arrays, the first is {differing[0]}")
        for p, t in targets.items():
            arrays[p] = arrays[p].astype(t.dtype)  # one at a time, so that no second copy of all is in memory
    if not_finite := [p for p, finite in _are_finite(arrays).items() if not finite]:
        arrays_contain = "1 array contains" if len(not_finite) == 1 else f"{len(not_finite)} arrays contain"
        raise InputError(f"{path}: {arrays_contain} NaN or infinity: {', '.join(not_finite)}")
    return arrays


def iterate_weights(path: Path, targets: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields what `load_weights` reads, one weight after the other, in the stored dtype and in memory.

    Only a few weights are in memory at a time (`iterate_arrays`). The caller checks that the values are finite.

    Args:
      targets: an object with the expected `shape` for each weight.

    Raises:
      InputError: the checkpoint is incomplete or damaged, or its arrays do not fit the targets.
    """
    _checked_shapes(path, targets)
    sums = _run_sums(path)
    for name, array in iterate_arrays(path, _checkpointable_name(path), WEIGHT_BYTES):
        if sums and array_sum(array) != sums.get(f"{PARAMS_FOLDER}.{name}"):
            raise InputError(f"{path}: checksum mismatch in {name}")
        yield name, array


def _checked_shapes(path: Path, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `stored_shapes(path)` after checking the files' sums, if there are any, and the names and shapes.

    Raises InputError if they do not fit the targets. `decoder.inv_freq` may be missing.
    """
    check_files(path)
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
    return stored


def _stored(target: jax.ShapeDtypeStruct, dtype: np.dtype) -> jax.ShapeDtypeStruct:
    """Returns a target with the stored dtype, whose bits were summed."""
    return jax.ShapeDtypeStruct(target.shape, dtype, sharding=target.sharding)


def _run_sums(path: Path) -> dict[str, int] | None:
    """Returns the sums of the arrays of a run's checkpoint, None if the folder is no such checkpoint.

    Raises InputError if the checkpoint has none or is that of another step.
    """
    if _checkpointable_name(path) != PARAMS_FOLDER:
        return None
    sums = stored_metadata(path).get(SUMS)
    if problem := sums_problem(path, sums):
        raise InputError(f"{path}: {problem}")
    return sums


def with_extra_state(metadata: dict[str, Any], extra_state: Any) -> dict[str, Any]:
    """Returns the metadata of a run's checkpoint with its extra state and the sum of that."""
    return metadata | {EXTRA_STATE: extra_state, EXTRA_STATE_SUM: json_sum(extra_state)}


def is_extra_state_intact(metadata: Mapping[str, Any]) -> bool:
    """Returns whether the extra state is there and is what was saved. Earlier versions wrote no sum of it."""
    if EXTRA_STATE not in metadata:
        return False
    return EXTRA_STATE_SUM not in metadata or metadata[EXTRA_STATE_SUM] == json_sum(metadata[EXTRA_STATE])


def sums_problem(path: Path, sums: Any) -> str | None:
    """Returns why the sums in the metadata of a run's checkpoint are not those of its step, None if they are."""
    if not isinstance(sums, dict):
        return "its metadata are damaged: the sums are missing"
    # The sum of one integer is the integer. A folder that has been renamed for good, such as "best", has no step.
    if is_step(path.name) and (step := sums.get("step")) != int(path.name):
        return f"is the checkpoint of step {step}, not of the step in its name"
    return None


@jax.jit
def _are_finite(arrays: FlatParams) -> FlatParams:
    return jax.tree.map(lambda array: jnp.isfinite(array).all(), arrays)


def stored_shapes(path: Path) -> dict[str, Any]:
    """Returns an object with `shape` and `dtype` for each weight of an Orbax checkpoint, by path."""
    return flatten(_metadata(path).metadata)


class MissingSums(InputError):
    """The file of the sums that converted parameters were written with is missing."""


def stored_metadata(path: Path) -> dict[str, Any]:
    """Returns the metadata that were written with the checkpoint."""
    return _metadata(path).custom_metadata or {}


def iterate_arrays(path: Path, item: str, read_bytes: int = READ_BYTES) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each array of an Orbax checkpoint with its path, in the stored dtype and in memory.

    A few arrays are read together. Not more than `read_bytes`, or the largest array, is in memory at a time.

    Args:
      item: the name of the arrays in the checkpoint, "AUTO" if they are all that it contains.

    Raises:
      InputError: the checkpoint cannot be read.
    """
    from orbax.checkpoint import v1 as ocp

    stored = _metadata(path, item).metadata
    is_nested = any(isinstance(value, Mapping) for value in stored.values())
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    for group in _read_groups(flatten(stored), read_bytes):
        targets = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in group.items()}
        with context, quiet_orbax():
            try:
                loaded = ocp.load(path.absolute(), nest(targets) if is_nested else targets, checkpointable_name=item)
            except Exception as e:  # Orbax and TensorStore raise many types for damaged files
                _check_exists(path)
                raise InputError(f"{path}: cannot be read ({first_line(e)})") from e
        arrays = flatten(loaded)
        del loaded, targets
        for name in list(arrays):
            yield name, arrays.pop(name)  # the caller alone keeps it


def _read_groups(stored: FlatParams, read_bytes: int) -> Iterator[FlatParams]:
    group: FlatParams = {}
    size = 0
    for name, leaf in stored.items():
        n = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if group and size + n > read_bytes:
            yield group
            group, size = {}, 0
        group[name] = leaf
        size += n
    yield group


def save_weights(path: Path, groups: Iterable[FlatParams], metadata: dict[str, Any]) -> None:
    """Writes an Orbax checkpoint, uncompressed, one group at a time, so that only one group is in memory.

    `path` must not exist, and the checkpoint is incomplete until this returns: the caller writes to a staging folder.

    Raises:
      InputError: the weights are quantized, so that what they were is not known.
    """
    from orbax.checkpoint import v1 as ocp

    sums: dict[str, int] = {}
    context = ocp.Context()
    context.array.saving.use_compression = False
    with context, quiet_orbax():
        for group in groups:
            if quantized := [name for name, array in group.items() if isinstance(array, QuantizedWeight)]:
                raise InputError(f"{path}: quantized weights cannot be saved, such as {quantized[0]}")
            sums |= {name: array_sum(np.asarray(array)) for name, array in group.items()}
            with interrupt_at_end():  # Orbax's threads would go on and write to a folder that is being removed
                ocp.partial.save(path.absolute(), nest(group), custom_metadata=metadata | {SUMS: SUMS_FILE})
        with interrupt_at_end():
            ocp.partial.finalize(path.absolute())
    write_sums(path, sums)


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
    return "AUTO" if path.name == PARAMS_FOLDER and not is_run_checkpoint(path) else PARAMS_FOLDER


def _check_exists(path: Path) -> None:
    """Raises InputError if a checkpoint is not there (any more): a run removes old ones, also while they are read."""
    if not path.exists():
        raise InputError(f"{path}: does not exist; if a run has removed it meanwhile, repeat the command")


def _metadata(path: Path, item: str | None = None):
    """Returns Orbax's metadata of the weights, or of another item. Raises InputError if they cannot be read."""
    from orbax.checkpoint import v1 as ocp

    check_path(path)
    with quiet_orbax():
        try:
            metadata = ocp.metadata(path.absolute(), item or _checkpointable_name(path))
        except Exception as e:  # not a checkpoint, or an incomplete one
            _check_exists(path)
            check_files(path)  # names the file that is missing or damaged
            raise InputError(f"{path}: not a complete checkpoint ({first_line(e)})") from e
    custom = metadata.custom_metadata or {}
    if metadata.metadata is None or not isinstance(custom, dict):
        check_files(path)
        raise InputError(f"{path}: not a complete checkpoint")
    if custom.get(SUMS) == SUMS_FILE and not (path / SUMS_FILE).is_file():
        raise MissingSums(f"{path / SUMS_FILE}: is missing; copy the folder again")
    return metadata
