"""Reads the tensors of a published folder and checks them against its config.json."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from davae_jax.checkpoints.published import torch_file
from davae_jax.checkpoints.published.published_names import INV_FREQ, POSITION_IDS, NameRow, name_table
from davae_jax.model.config import DAVAEConfig
from davae_jax.utils.errors import InputError

# The sibling models PPVAE and GAVAE contain the text VAE under one more prefix, and further tensors.
SIBLING_PREFIX = "vae_model.vae_model."


def read_published_weights(folder: Path, config: DAVAEConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path in the model, array in the file's dtype) for each weight of a published folder.

    Raises:
      InputError: the file is damaged or does not fit the config.
    """
    state = read_published_state(folder)
    for row in checked_name_table(state, config, torch_file.find_weights_file(folder)):
        yield row.path, row.to_model(state[row.name])


def read_published_state(folder: Path) -> dict[str, np.ndarray]:
    """Returns the file's tensors by their published names; of a sibling model, only those of its text VAE."""
    path = torch_file.find_weights_file(folder)
    return select_text_vae(torch_file.read_tensors(path), path)


def select_text_vae(state: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """Returns a file's tensors, or those of the text VAE if the file is a sibling model's. `path` is the file."""
    text_vae = {
        name.removeprefix("vae_model."): array for name, array in state.items() if name.startswith(SIBLING_PREFIX)
    }
    if text_vae and (others := len(state) - len(text_vae)):
        message = f"{path}: {others} tensors outside {SIBLING_PREFIX} belong to the sibling model and are ignored"
        warnings.warn(message, stacklevel=2)
    return text_vae or state


def checked_name_table(state: dict[str, np.ndarray], config: DAVAEConfig, path: Path) -> list[NameRow]:
    """Returns the rows of the name table that the file contains; it may lack `inv_freq` and `position_ids`.

    Raises:
      InputError: tensors do not fit the config; one message lists all problems.
    """
    table = [row for row in name_table(config) if row.name != INV_FREQ or row.name in state]
    check_tensors(state, table, path, ignored=[POSITION_IDS])
    if POSITION_IDS in state and not np.array_equal(
        np.ravel(state[POSITION_IDS]), np.arange(config.encoder.max_position_embeddings)
    ):
        raise InputError(f"{path}: {POSITION_IDS} is not 0, 1, 2, … up to the number of the encoder's positions")
    return table


def check_tensors(
    state: dict[str, np.ndarray], table: list[NameRow], path: Path, ignored: Collection[str] = ()
) -> None:
    """Checks the tensors of a file against the table: names, shapes, floating point, finite.

    Raises:
      InputError: some do not match; one message lists them all. `path` is the file, for that message.
    """
    expected = {row.name for row in table} | set(ignored)
    problems = {
        "missing": [row.name for row in table if row.name not in state],
        "unexpected": [name for name in state if name not in expected],
        "misshapen": [],
        "not floating point": [],
        "with NaN or infinity": [],
    }
    for row in table:
        if row.name not in state:
            continue
        array = state[row.name]
        if array.shape != row.file_shape:
            problems["misshapen"].append(f"{row.name} ({list(array.shape)}, expected {list(row.file_shape)})")
        elif not torch_file.is_float(array):
            problems["not floating point"].append(f"{row.name} ({array.dtype})")
        elif not torch_file.is_finite(array):
            problems["with NaN or infinity"].append(row.name)
    if messages := [f"{len(names)} {problem}: {', '.join(names)}" for problem, names in problems.items() if names]:
        raise InputError(f"{path}: {'; '.join(messages)}")
