"""Checkpoints on disk, and `from_pretrained`.

A converted checkpoint is a folder with the published config.json, the tokenizers' files where the source had them, and
`params/`, an Orbax checkpoint in the source's dtype. What is loaded goes straight to its place on the mesh, cast on the
way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from davae_jax.checkpoints.hub import resolve_source
from davae_jax.checkpoints.run_folder import CONFIG_FILE, config_folder, weights_path
from davae_jax.checkpoints.weights import FlatParams, flatten, load_weights, unflatten
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import DAVAE, abstract_model, merge, split, weight_axes
from davae_jax.model.decoder import inverse_frequencies
from davae_jax.parallel.sharding import weight_sharding
from davae_jax.utils.errors import InputError


def from_pretrained(source: str | Path, *, dtype=jnp.float32, mesh: Mesh | None = None) -> DAVAE:
    """Loads a model.

    Args:
      source: a converted checkpoint; a run folder, of which the newest complete checkpoint is read; one checkpoint of a
        run, `RUN/checkpoints/STEP`; a published folder
        (config.json and pytorch_model.bin, which needs PyTorch, or model.safetensors, which does not); or a Hugging
        Face repo id, downloaded to the hub's cache.
      dtype: what weights are kept and computed in; softmax, LayerNorm and losses are float32 all the same.
      mesh: devices to lay the weights over (axes `data`, `fsdp`, `tensor`); None for the first device alone.

    Raises:
      InputError: nothing there, or what is there does not fit its config.json; the message names the file.
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
        from davae_jax.checkpoints.published_state import read_published_weights

        arrays = _place(read_published_weights(folder, config), targets)
    if (missing := targets.keys() - arrays.keys()) == {"decoder.inv_freq"}:
        # A source without the stored frequencies: the published program computes them, and so does a fresh decoder.
        arrays |= _place([("decoder.inv_freq", inverse_frequencies(config.decoder.hidden_size))], targets)
    elif missing:
        raise InputError(f"{folder}: lacks {', '.join(sorted(missing))}")
    return merge(graphdef, unflatten(arrays))


def _place(
    arrays: Iterable[tuple[str, np.ndarray]] | Iterator, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> FlatParams:
    """Casts each array and puts it on its devices, one at a time."""
    return {p: jax.device_put(np.asarray(a).astype(targets[p].dtype), targets[p].sharding) for p, a in arrays}
