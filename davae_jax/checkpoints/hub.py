"""Where a model comes from: a folder, or a repo of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from davae_jax.checkpoints.run_folder import CONFIG_FILE, PARAMS_FOLDER
from davae_jax.checkpoints.torch_file import TORCH_FILES
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.errors import InputError, first_line

HUB_PATTERNS = [CONFIG_FILE, *TORCH_FILES, *TOKENIZER_FILES, f"{PARAMS_FOLDER}/**"]


def resolve_source(source: str | Path) -> Path:
    """The folder of a model: `source` itself, or where the hub's client put the repo of that id."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{source}: is a file; give the folder that holds {CONFIG_FILE}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise InputError(f"{source}: no such folder")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=HUB_PATTERNS))
    except Exception as e:  # the client raises a dozen unrelated types: network, authentication, missing repo
        raise InputError(
            f"{source}: no such folder, and not to be had from the Hugging Face hub: {first_line(e)}"
        ) from e
