"""Locates config, tokenizers and weights in a run folder and in a converted checkpoint.

A converted checkpoint contains config.json, the tokenizers' files and `params/`, an Orbax checkpoint of the weights.
A run folder contains config.json, the tokenizers' files and `checkpoints/STEP/`, an Orbax checkpoint for each saved
step, whose item "params" is the weights, and whose item "state" is the rest of the train state.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from davae_jax.checkpoints.orbax_logging import quiet_orbax
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import check_utf8_path, file_sha256

CONFIG_FILE = "config.json"
PARAMS_FOLDER = "params"
CHECKPOINTS_FOLDER = "checkpoints"
STATE_ITEM = "state"
CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"  # Orbax's file in the folder of a checkpoint
INIT_FOLDER = "init"  # in the run folder: the checkpoint that a warm start begins from
RUN_SETTINGS = "train.json"
TOKENIZER_HASHES = "digests_of_tokenizers"  # in RUN_SETTINGS: file → SHA-256
SOURCE_DIGEST = "digest_of_init_model"  # in RUN_SETTINGS: of the weights of --init.model
# Files in these folders that the project reads, beside those in the subfolders.
MODEL_FILES = (CONFIG_FILE, *TOKENIZER_FILES, "model.safetensors", "pytorch_model.bin")
LOGS = ("metrics.jsonl", "held_out.jsonl", "samples.jsonl")
RUN_FILES = (RUN_SETTINGS, *LOGS)


def model_files(*folders: str | Path | None) -> list[Path]:
    """Returns the files of models and runs, which may not exist, that no result of a command may replace."""
    given = [Path(folder) for folder in folders if folder]
    runs = [run for folder in given if folder.is_dir() and (run := config_folder(folder)) != folder]
    return [folder / name for folder in (*given, *runs) for name in (*MODEL_FILES, *RUN_FILES)]


def weights_path(folder: Path) -> Path | None:
    """Returns the Orbax checkpoint with a folder's weights, or None if there is none.

    `folder` is a converted checkpoint, a run folder (its newest complete checkpoint is taken) or one checkpoint of a
    run, which may have been copied elsewhere with config.json and the tokenizers.
    """
    if config_folder(folder) != folder or is_run_checkpoint(folder):
        return folder.resolve()
    if (folder / PARAMS_FOLDER).is_dir():
        return folder / PARAMS_FOLDER
    return max(complete_checkpoints(folder), key=lambda path: int(path.name), default=None)


def is_run_checkpoint(folder: Path) -> bool:
    """Returns whether a folder is one checkpoint of a run by its contents. A converted model has no metadata here."""
    return (folder / CHECKPOINT_METADATA).is_file() and (folder / PARAMS_FOLDER).is_dir()


def config_folder(folder: Path) -> Path:
    """Returns the folder of config.json and the tokenizers: `folder`, or the run that the checkpoint belongs to.

    What a folder is shows in its contents; `folder` may be a link, and a model may be in a folder called "checkpoints".
    """
    if (folder / CONFIG_FILE).exists():
        return folder
    for path in (folder.absolute(), folder.resolve()):  # the folder of checkpoints may be a link as well
        parent = path.parent
        if path.name != ".." and parent.name == CHECKPOINTS_FOLDER and (parent.parent / CONFIG_FILE).exists():
            return parent.parent
    return folder


def check_path(folder: Path) -> None:
    """Raises InputError if Orbax cannot read checkpoints below a folder.

    It takes paths for patterns, and for addresses of Google's storage if they contain "gs:/".
    """
    check_utf8_path(folder.absolute())
    if forbidden := [part for part in ("[", "]", "*", "?", "\\", "gs:/") if part in f"{folder.absolute()}/"]:
        raise InputError(f"{folder}: checkpoints cannot be read from a path with {forbidden[0]}; choose another folder")


def complete_checkpoints(run: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, in no particular order; each folder's name is its step.

    Raises:
      InputError: they cannot be read, for example because the folder is a link to nothing. A run must not begin anew
        because a disk is not there.
    """
    from orbax.checkpoint import v1 as ocp

    with quiet_orbax():
        steps = [path for path in saved_steps(run) if _has_files(path / PARAMS_FOLDER)]
        if steps:
            check_path(run)
        return [path for path in steps if ocp.is_orbax_checkpoint(path.absolute())]


def tokenizer_changes(run: Path, settings: Mapping[str, Any]) -> list[str]:
    """Returns a line for each tokenizer that differs from the one with which the run began.

    Args:
      settings: the content of RUN_SETTINGS. An earlier version has written no hashes to it.
    """
    hashes = settings.get(TOKENIZER_HASHES, {})
    if not isinstance(hashes, dict):
        return [f"{run / RUN_SETTINGS}: is damaged: {TOKENIZER_HASHES} is no object"]
    files = [(run / name, digest) for name, digest in hashes.items() if name in TOKENIZER_FILES]
    return [f"{path}: is not the tokenizer that the run began with" for path, x in files if file_sha256(path) != x]


def saved_steps(run: Path) -> list[Path]:
    """Returns the folders of a run that are named as checkpoints, complete or not. Raises as `complete_checkpoints`."""
    folder = run / CHECKPOINTS_FOLDER
    try:
        return [path for path in folder.iterdir() if is_step(path.name)] if os.path.lexists(folder) else []
    except OSError as e:
        reason = "is a link to nothing" if isinstance(e, FileNotFoundError) else f"cannot be read ({e.strerror})"
        raise InputError(f"{folder}: {reason}") from None


def _has_files(folder: Path) -> bool:
    """Returns whether a folder contains a file, at any depth. Orbax takes an empty folder for a checkpoint."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # a run may remove old checkpoints meanwhile
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})")

    return any(files for _, _, files in os.walk(folder, onerror=fail))


def is_step(name: str) -> bool:
    """Returns whether a folder of this name is the checkpoint of a step."""
    return re.fullmatch("0|[1-9][0-9]*", name) is not None
