"""Finds a model's folder: a local one, or a download from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from davae_jax.checkpoints.published.torch_file import INDEX_SUFFIX, TORCH_FILES
from davae_jax.checkpoints.run_folder import CONFIG_FILE, PARAMS_FOLDER
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.errors import InputError, first_line

PARTS = ["model-*-of-*.safetensors", "pytorch_model-*-of-*.bin", f"*{INDEX_SUFFIX}"]
DOWNLOADED_FILES = [CONFIG_FILE, *TORCH_FILES, *PARTS, *TOKENIZER_FILES, f"{PARAMS_FOLDER}/**"]


def local_source(source: str | Path) -> Path | None:
    """Returns the folder that `source` names, or None if it can only be the id of a repo. Downloads nothing.

    Raises:
      InputError: `source` is a file, or neither a folder nor the id of a repo.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{source}: is a file; pass the folder that contains {CONFIG_FILE}")
    if links := [path for path in (folder, *folder.parents) if path.is_symlink() and not path.exists()]:
        raise InputError(f"{source}: no such folder; {links[0]} is a link to nothing")  # not the name of a repo
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise InputError(f"{source}: no such folder")
    return None


def resolve_source(source: str | Path) -> Path:
    """Returns a model's folder: `source` itself, or the hub client's local copy of the repo with that id.

    Raises:
      InputError: `source` is a file, or neither a folder nor a repo that can be downloaded.
    """
    if folder := local_source(source):
        return folder
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=DOWNLOADED_FILES))
    except Exception as e:  # the client raises a dozen unrelated types: network, authentication, missing repo
        raise InputError(
            f"{source}: no such folder, and cannot be downloaded from the Hugging Face hub: {first_line(e)}"
        ) from e
