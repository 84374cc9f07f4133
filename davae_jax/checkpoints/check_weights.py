"""Lists what is wrong with weights on a disk: in a converted model, a published folder, a checkpoint of a run.

What `davae convert`, `warm-start` and `export` have written is read back by these functions before it gets its name,
and `davae check` calls them for any folder. Only a few arrays are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from davae_jax.checkpoints.published import torch_file
from davae_jax.checkpoints.published.published_names import name_table
from davae_jax.checkpoints.published.published_state import checked_name_table, select_text_vae
from davae_jax.checkpoints.run_folder import CONFIG_FILE, PARAMS_FOLDER, STATE_ITEM
from davae_jax.checkpoints.sums import array_sum, file_problems, read_sums
from davae_jax.checkpoints.weights import (
    INV_FREQ_PATH,
    SUMS,
    is_extra_state_intact,
    iterate_arrays,
    stored_metadata,
    stored_shapes,
    sums_problem,
)
from davae_jax.model.config import DAVAEConfig
from davae_jax.tokenizers.decoder import count_pieces
from davae_jax.tokenizers.encoder import read_vocabulary
from davae_jax.tokenizers.load import TOKENIZER_FILES, load_tokenizers
from davae_jax.utils.errors import InputError


def converted_problems(folder: Path) -> list[str]:
    """Returns the problems of a converted model: files, config, names, shapes, values."""
    return file_problems(folder / PARAMS_FOLDER) or value_problems(folder)  # damaged files are not opened


def value_problems(folder: Path) -> list[str]:
    """Returns the problems of a converted model whose files are those that were written."""
    params = folder / PARAMS_FOLDER
    config, problems = read_config(folder)
    try:
        problems += _misfits(params, config)
        sums = (read_sums(params) or {}).get("arrays")
        problems += list(_wrong_values(params, "AUTO", "", sums))
    except InputError as e:
        problems.append(str(e))
    return problems


def checkpoint_problems(path: Path, config: DAVAEConfig | None) -> list[str]:
    """Returns the problems of one checkpoint of a run."""
    problems = []
    try:
        metadata = stored_metadata(path)
        sums = metadata.get(SUMS)
        if problem := sums_problem(path, sums):
            problems.append(f"{path}: {problem}")
        sums = sums if isinstance(sums, dict) else None
        if not is_extra_state_intact(metadata):
            problems.append(f"{path}: its metadata are damaged (their own sum differs)")
        problems += _misfits(path, config)
    except InputError as e:
        return [*problems, str(e)]
    for item, prefix in ((PARAMS_FOLDER, f"{PARAMS_FOLDER}."), (STATE_ITEM, "")):
        sums_of_item = sums and {
            name: n for name, n in sums.items() if name.startswith(f"{PARAMS_FOLDER}.") == bool(prefix)
        }
        try:
            problems += _wrong_values(path, item, prefix, sums_of_item)
        except InputError as e:
            problems.append(str(e))
    return problems


def published_problems(folder: Path, state: Mapping[str, np.ndarray] | None = None) -> list[str]:
    """Returns the problems of a published folder: its weights files and config.

    Args:
      state: the arrays that the files must contain, in their order; None: those that fit the config.
    """
    config, problems = read_config(folder)
    for path, tensors, problem in read_published(folder, config):
        if problem:
            problems.append(problem)
        elif state is not None:
            problems += _differences(path, tensors, state)
    return problems


def read_published(
    folder: Path, config: DAVAEConfig | None
) -> Iterator[tuple[Path, Mapping[str, np.ndarray], str | None]]:
    """Yields each weights file of a published folder, its tensors, and its problem if it is damaged or does not fit."""
    for path in [folder / name for name in torch_file.WEIGHTS_FILES if (folder / name).exists()]:
        tensors: Mapping[str, np.ndarray] = {}
        problem = None if path.is_file() else f"{path}: is not a file"
        try:
            if not problem:
                tensors = torch_file.read_tensors(path)
                if config:
                    checked_name_table(select_text_vae(tensors, path), config, path)
        except InputError as e:
            problem = str(e)
        yield path, tensors, problem


def read_config(folder: Path) -> tuple[DAVAEConfig | None, list[str]]:
    """Returns the config of a model's folder, or None and its problem."""
    try:
        return DAVAEConfig.from_json(folder / CONFIG_FILE), []
    except InputError as e:
        return None, [str(e)]


def tokenizer_problems(folder: Path, config: DAVAEConfig | None, *, needed: bool = False) -> list[str]:
    """Returns the problems of a folder's tokenizers.

    Args:
      config: the model that they must fit. If it has one tokenizer, it needs the other as well.
      needed: whether both must be there in any case. A model without any may be used with those of another folder.
    """
    paths = {folder / name: read for name, read in zip(TOKENIZER_FILES, (read_vocabulary, count_pieces), strict=True)}
    missing = [path for path in paths if not path.exists()]
    problems = [f"{path}: is missing" for path in missing] if needed or (config and len(missing) == 1) else []
    for path in [path for path in paths if path not in missing]:
        try:
            paths[path](path)
        except (InputError, OSError) as e:
            problems.append(str(e))
    if config and not problems and not missing:
        try:
            load_tokenizers(folder, config)
        except InputError as e:
            problems.append(str(e))
    return problems


def _misfits(path: Path, config: DAVAEConfig | None) -> list[str]:
    """Returns how the stored weights do not fit the config. Raises InputError if their metadata are damaged."""
    stored = stored_shapes(path)
    if config is None:
        return []
    expected = {row.path: tuple(row.model_shape) for row in name_table(config)}
    problems = [f"{name} is missing" for name in expected if name not in stored and name != INV_FREQ_PATH]
    problems += [f"{name} is unexpected" for name in stored if name not in expected]
    problems += [
        f"{name} has shape {list(leaf.shape)}, expected {list(expected[name])}"
        for name, leaf in stored.items()
        if name in expected and tuple(leaf.shape) != expected[name]
    ]
    return [f"{path}: does not fit {CONFIG_FILE}: {'; '.join(problems)}"] if problems else []


def _wrong_values(path: Path, item: str, prefix: str, sums: Mapping[str, Any] | None) -> Iterator[str]:
    """Yields a line for each array whose values are not what was written. Raises InputError if one cannot be read.

    Args:
      prefix: what precedes the arrays' names among the sums.
      sums: the sums of all arrays; None: there are none.
    """
    names = set()
    for name, array in iterate_arrays(path, item):
        names.add(prefix + name)
        if sums is not None and array_sum(array) != sums.get(prefix + name):
            yield f"{path}: {prefix + name} is damaged (its sum differs)"
        elif torch_file.is_float(array) and not torch_file.is_finite(array):
            yield f"{path}: {prefix + name} contains NaN or infinity"
    for name in sorted((sums or {}).keys() - names):
        yield f"{path}: {name} is missing"


def _differences(path: Path, tensors: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Yields how the tensors of a file differ from those that were written to it."""
    for name in sorted(tensors.keys() ^ state.keys()):
        yield f"{path}: {name} is {'missing' if name in state else 'unexpected'}"
    for name in tensors.keys() & state.keys():
        read, written = tensors[name], state[name]
        if (read.shape, read.dtype) != (written.shape, written.dtype) or array_sum(read) != array_sum(written):
            yield f"{path}: {name} is not what was written"
