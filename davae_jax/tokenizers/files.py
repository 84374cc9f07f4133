"""Reads the files of the tokenizers, and checks texts before they are tokenized."""

from __future__ import annotations

from pathlib import Path

from davae_jax.utils.errors import InputError
from davae_jax.utils.files import read_bounded

MAX_BYTES = 1 << 26  # of a vocabulary; a million entries take a third of it


def read_file(path: Path) -> bytes:
    """Returns the content of a file. Raises InputError if it is missing or cannot be read."""
    try:
        return read_bounded(path, MAX_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a tokenizer folder contains spiece.model and vocab.txt") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def require_unicode(text: str) -> None:
    """Raises InputError if a text contains half of a surrogate pair, which the tokenizers cannot encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        at, code = error.start, ord(text[error.start])
        raise InputError(f"text: the lone surrogate U+{code:04X} at position {at} is not a character") from None
