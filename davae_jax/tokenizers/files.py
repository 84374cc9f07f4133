"""Reading the tokenizers' files."""

from __future__ import annotations

from pathlib import Path

from davae_jax.utils.errors import InputError


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a tokenizer folder holds spiece.model and vocab.txt") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        at, code = error.start, ord(text[error.start])
        raise InputError(f"text: the lone surrogate U+{code:04X} at position {at} is no character") from None
