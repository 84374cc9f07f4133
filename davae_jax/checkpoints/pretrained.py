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
from davae_jax.checkpoints.weights import INV_FREQ_PATH, FlatParams, flatten, load_weights, unflatten
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import DAVAE, abstract_model, merge, split, weight_axes
from davae_jax.model.decoder import inverse_frequencies
from davae_jax.parallel.sharding import weight_sharding
from davae_jax.utils.errors import InputError


def from_pretrained(source: str | Path, *, dtype=jnp.float32, mesh: Mesh | None = None) -> DAVAE:
    """Loads a model.

    Args:
      source: a converted checkpoint; a run folder, whose newest complete checkpoint is read; one checkpoint of a run,
        `RUN/checkpoints/STEP`; a published folder (config.json and pytorch_model.bin, which needs PyTorch, or
        model.safetensors, which does not); or a Hugging Face repo id, downloaded to the hub's cache.
      dtype: dtype of the weights and the computation; softmax, LayerNorm and losses are float32 in any case.
      mesh: devices over which the weights are sharded (axes `data`, `fsdp`, `tensor`); None for the first device.

    Raises:
      InputError: the source contains no model, or its weights do not fit its config.json; the message names the file.
    """
    folder = resolve_source(source)
    config = DAVAEConfig.from_json(config_folder(folder) / CONFIG_FILE)
    model = abstract_model(config, dtype=dtype, param_dtype=dtype)
    graphdef, abstract = split(model)
    axes = flatten(weight_axes(model))
    targets = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=weight_sharding(axes[path], leaf.shape, mesh))
        for path, leaf in flatten(abstract).items()
    }
    if stored := weights_path(folder):
        arrays = load_weights(stored, targets)
    else:
        arrays = _put(read_published_weights(folder, config), targets, folder)
    if (missing := targets.keys() - arrays.keys()) == {INV_FREQ_PATH}:
        # If the file lacks the frequencies, the published program computes them.
        frequencies = inverse_frequencies(config.decoder.hidden_size)
        arrays |= _put([(INV_FREQ_PATH, frequencies)], targets, folder)
    elif missing:
        raise InputError(f"{folder}: lacks {', '.join(sorted(missing))}")
    return merge(graphdef, unflatten(arrays))


def _put(
    arrays: Iterable[tuple[str, np.ndarray]], targets: Mapping[str, jax.ShapeDtypeStruct], folder: Path
) -> FlatParams:
    """Casts each array to its target's dtype and puts it on its devices, one at a time.

    Raises InputError if values overflow in that dtype.
    """
    placed = {}
    for path, array in arrays:
        dtype = targets[path].dtype
        with np.errstate(over="ignore"):
            cast = np.asarray(array).astype(dtype)
        if dtype != array.dtype and not is_finite(cast):
            raise InputError(f"{folder}: overflows in {dtype}: {path}")
        placed[path] = jax.device_put(cast, targets[path].sharding)
    return placed
