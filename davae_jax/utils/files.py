"""Writes files so that they appear complete or not at all, and hashes them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from davae_jax.utils.errors import InputError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary file in the folder of `path`, which replaces `path` at the end of the `with` block.

    If the block raises, the temporary file is removed and `path` is unchanged.
    """
    file = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield file
        file.replace(path)
    finally:
        file.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file as `atomic_write` does."""
    with atomic_write(path) as file:
        file.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text as `atomic_write` does."""
    with atomic_write(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """Writes values as indented JSON, as `atomic_write` does."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def is_partial(path: Path) -> bool:
    """Returns whether a file is a temporary one of `atomic_write`, which a killed program does not remove."""
    return re.fullmatch(r"\..+\.\d+\.partial", path.name) is not None


def remove_partial(folder: Path) -> None:
    """Removes the temporary files that killed programs have left in a folder."""
    for path in filter(is_partial, folder.iterdir()):
        path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal. Raises InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
