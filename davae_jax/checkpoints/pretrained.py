"""Loads a model from any folder that contains one: `from_pretrained`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from davae_jax.checkpoints.hub import resolve_source
from davae_jax.checkpoints.published.published_state import read_published_weights
from davae_jax.checkpoints.published.torch_file import is_finite
from davae_jax.checkpoints.run_folder import CONFIG_FILE, config_folder, weights_path
from davae_jax.checkpoints.weights import (
    INV_FREQ_PATH,
    FlatParams,
    flatten,
    iterate_weights,
    load_weights,
    unflatten,
)
from davae_jax.model.config import DAVAEConfig, WeightFormat
from davae_jax.model.davae import DAVAE, abstract_model, merge, split, weight_axes
from davae_jax.model.decoder import inverse_frequencies
from davae_jax.model.quantized import STORED_DTYPES, QuantizedWeight, check_format, is_quantized, quantize
from davae_jax.parallel.sharding import Axes, weight_sharding
from davae_jax.utils.errors import InputError


def from_pretrained(
    source: str | Path, *, dtype=jnp.float32, weights: WeightFormat = "float32", mesh: Mesh | None = None
) -> DAVAE:
    """Loads a model.

    Args:
      source: a converted checkpoint; a run folder, whose newest complete checkpoint is read; one checkpoint of a run,
        `RUN/checkpoints/STEP`; a published folder (config.json with pytorch_model.bin or model.safetensors, neither of
        which needs PyTorch); or a Hugging Face repo id, downloaded to the hub's cache.
      dtype: dtype of the weights and the computation; softmax, LayerNorm and losses are float32 in any case.
      weights: the format in which the matrices of encoder and decoder are stored, for inference with less memory
        (`davae_jax.model.quantized`): "int8" or "bfloat16"; "float32" stores them in `dtype`. A model with quantized
        weights can neither be trained nor saved.
      mesh: devices over which the weights are sharded (axes `data`, `fsdp`, `tensor`); None for the first device.

    Raises:
      InputError: the source contains no model, or its weights do not fit its config.json; the message names the file.
    """
    check_format(weights)
    folder = resolve_source(source)
    config = DAVAEConfig.from_json(config_folder(folder) / CONFIG_FILE)
    model = abstract_model(config, dtype=dtype, param_dtype=dtype)
    graphdef, abstract = split(model)
    axes = flatten(weight_axes(model))
    targets = {path: _target(path, leaf, axes[path], weights, mesh) for path, leaf in flatten(abstract).items()}
    stored = weights_path(folder)
    if stored and weights == "float32":
        arrays = load_weights(stored, targets)
    elif stored:
        arrays = _put(iterate_weights(stored, targets), targets, folder)
    else:
        arrays = _put(read_published_weights(folder, config), targets, folder)
    if (missing := targets.keys() - arrays.keys()) == {INV_FREQ_PATH}:
        # If the file lacks the frequencies, the published program computes them.
        frequencies = inverse_frequencies(config.decoder.hidden_size)
        arrays |= _put([(INV_FREQ_PATH, frequencies)], targets, folder)
    elif missing:
        raise InputError(f"{folder}: lacks {', '.join(sorted(missing))}")
    return merge(graphdef, unflatten(arrays))


def _target(
    path: str, leaf: jax.ShapeDtypeStruct, axes: Axes, weights: WeightFormat, mesh: Mesh | None
) -> jax.ShapeDtypeStruct | QuantizedWeight:
    """Returns dtype and sharding of a weight, or of its values and scales. A scale is sharded as a bias of its rows."""

    def array(axes: Axes, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=weight_sharding(axes, shape, mesh))

    if weights == "float32" or not is_quantized(path, leaf.shape):
        return array(axes, leaf.shape, leaf.dtype)
    scale = array(axes[:-1], leaf.shape[:-1], jnp.float32) if weights == "int8" else None
    return QuantizedWeight(array(axes, leaf.shape, STORED_DTYPES[weights]), scale)


def _put(
    arrays: Iterable[tuple[str, np.ndarray]],
    targets: Mapping[str, jax.ShapeDtypeStruct | QuantizedWeight],
    folder: Path,
) -> FlatParams:
    """Casts or quantizes each array as its target says and puts it on its devices, one at a time.

    Raises InputError if values are not finite in that dtype.
    """
    placed = {}
    for path, array in arrays:
        target = targets[path]
        if isinstance(target, QuantizedWeight):
            try:
                cast = quantize(np.asarray(array), "bfloat16" if target.scale is None else "int8")
            except FloatingPointError as e:
                raise InputError(f"{folder}: {path} contains {e}") from None
        else:
            with np.errstate(over="ignore"):
                cast = np.asarray(array).astype(target.dtype)
            if not is_finite(cast):
                problem = f"overflows in {target.dtype}" if is_finite(array) else "contains NaN or infinity"
                raise InputError(f"{folder}: {problem}: {path}")
        placed[path] = jax.device_put(cast, jax.tree.map(lambda leaf: leaf.sharding, target))
    return placed
