"""The tensors of a published file, checked against its config.json."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from davae_jax.checkpoints import torch_file
from davae_jax.checkpoints.published_names import INV_FREQ, POSITION_IDS, NameRow, name_table
from davae_jax.model.config import DAVAEConfig
from davae_jax.utils.errors import InputError

SIBLING_PREFIX = "vae_model."


def read_published_weights(folder: Path, config: DAVAEConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(path in the model, array in the source's dtype) of each weight, for loading a published folder directly."""
    state = read_published_state(folder)
    for row in checked_name_table(state, config, torch_file.find_weights_file(folder)):
        yield row.path, row.to_model(state[row.name])


def read_published_state(folder: Path) -> dict[str, np.ndarray]:
    """The file's tensors under the published names. Of a sibling model (PPVAE, GAVAE), the text VAE's part alone."""
    path = torch_file.find_weights_file(folder)
    state = torch_file.read_tensors(path)
    inner = {
        name.removeprefix(SIBLING_PREFIX): array for name, array in state.items() if name.startswith(2 * SIBLING_PREFIX)
    }
    if inner and (others := len(state) - len(inner)):
        message = f"{path}: {others} tensors outside {2 * SIBLING_PREFIX} belong to the sibling model and are left out"
        warnings.warn(message, stacklevel=2)
    return inner or state


def checked_name_table(state: dict[str, np.ndarray], config: DAVAEConfig, path: Path) -> list[NameRow]:
    """The rows that the file holds (`inv_freq` may be absent), or one InputError that names all that is wrong."""
    table = [row for row in name_table(config) if row.name != INV_FREQ or row.name in state]
    check_tensors(state, table, path, ignored=[POSITION_IDS])
    return table


def check_tensors(
    state: dict[str, np.ndarray], table: list[NameRow], path: Path, ignored: Collection[str] = ()
) -> None:
    """Raises one InputError that names all tensors of `state` that do not fit the table's rows."""
    known = {row.name for row in table} | set(ignored)
    problems = {
        "missing": [row.name for row in table if row.name not in state],
        "unexpected": [name for name in state if name not in known],
        "misshapen": [],
        "not floating point": [],
        "NaN or infinite": [],
    }
    for row in table:
        if row.name not in state:
            continue
        array = state[row.name]
        if array.shape != row.file_shape:
            problems["misshapen"].append(f"{row.name} ({list(array.shape)}, not {list(row.file_shape)})")
        elif not torch_file.is_float(array):
            problems["not floating point"].append(f"{row.name} ({array.dtype})")
        elif not torch_file.is_finite(array):
            problems["NaN or infinite"].append(row.name)
    if said := [f"{len(which)} {kind}: {', '.join(which)}" for kind, which in problems.items() if which]:
        raise InputError(f"{path}: {'; '.join(said)}")
