"""Exports a davae-jax checkpoint to the published PyTorch layout, which the published program loads.

python -m convert.to_torch SRC DST [--dtype float16] [--format bin|safetensors|both]
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from davae_jax.checkpoints.check_weights import published_problems
from davae_jax.checkpoints.hub import resolve_source
from davae_jax.checkpoints.published import torch_file
from davae_jax.checkpoints.published.published_names import INV_FREQ, POSITION_IDS, name_table
from davae_jax.checkpoints.run_folder import CONFIG_FILE, PARAMS_FOLDER, config_folder, is_run_checkpoint, weights_path
from davae_jax.checkpoints.staging import copy_files, staged_folder
from davae_jax.checkpoints.weights import load_weights, stored_metadata, stored_shapes
from davae_jax.model.config import DAVAEConfig
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.errors import InputError

Format = Literal["bin", "safetensors", "both"]


def export(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: Literal["float16", "float32"] = "float16",
    format: Format = "bin",
    overwrite: bool = False,
) -> Path:
    """Writes pytorch_model.bin and/or model.safetensors with config.json and the tokenizers' files; returns `dst`.

    Names, shapes and their order are the published ones; the two buffers are written only if the checkpoint's source
    had them.

    Raises:
      InputError: `src` is not a converted or trained checkpoint, `dst` exists, or a value is too large for `dtype`.
    """
    folder, dst = resolve_source(src), Path(dst)
    config = DAVAEConfig.from_json(config_folder(folder) / CONFIG_FILE)
    if not weights_path(folder):
        raise InputError(
            f"{folder}: contains no {PARAMS_FOLDER}/; only converted or trained checkpoints can be exported"
        )
    if not config.decoder.latent_every_layer:
        raise InputError(f"{folder}: decoder.latent_every_layer is false; the published program does not support this")
    state: dict[str, np.ndarray] = {}
    with staged_folder(
        dst, overwrite=overwrite, sources=[folder], read_back=lambda staging: published_problems(staging, state)
    ) as staging:
        state |= published_state(folder, config, np.dtype(dtype))
        if format in ("bin", "both"):
            torch_file.write_bin(staging / "pytorch_model.bin", state)
        if format in ("safetensors", "both"):
            torch_file.write_safetensors(staging / "model.safetensors", state)
        copy_files([CONFIG_FILE, *TOKENIZER_FILES], config_folder(folder), staging)
    return dst


def published_state(folder: Path, config: DAVAEConfig, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Returns the checkpoint's arrays by their published names, in the published file's order.

    Raises:
      InputError: the checkpoint is damaged, or values overflow in `dtype`.
    """
    path = weights_path(folder)
    stored = stored_shapes(path)
    table = name_table(config)
    device = SingleDeviceSharding(jax.local_devices()[0])
    dtypes = {row.path: stored[row.path].dtype if row.path in stored else np.float32 for row in table}
    targets = {row.path: jax.ShapeDtypeStruct(row.model_shape, dtypes[row.path], sharding=device) for row in table}
    arrays = load_weights(path, targets)
    metadata = stored_metadata(path)
    if not is_run_checkpoint(path) and "buffers" not in metadata:
        raise InputError(f"{path}: its metadata is damaged: the list of buffers is missing")
    buffers = metadata.get("buffers", [])
    state = {}
    if "position_ids" in buffers:
        state[POSITION_IDS] = np.arange(config.encoder.max_position_embeddings)[None]
    too_large = []
    for row in table:
        if row.name == INV_FREQ and "inv_freq" not in buffers:
            continue
        array = np.asarray(arrays.pop(row.path))
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        if row.name == INV_FREQ and not np.array_equal(cast, array):
            cast = array.astype(np.float32)  # rounding the frequencies would change what the model computes
        if not torch_file.is_finite(cast):
            too_large.append(f"{row.name} ({row.path})")
        state[row.name] = row.to_file(cast)
    if too_large:
        raise InputError(f"{folder}: overflows in {dtype}: {', '.join(too_large)}")
    return state
