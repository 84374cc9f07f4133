"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A file beside `path`; it takes that name once it is written, and is gone where that failed."""
    file = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield file
        file.replace(path)
    finally:
        file.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether it is what a killed program was writing (`atomic_write`)."""
    return re.fullmatch(r"\..+\.\d+\.partial", path.name) is not None


def remove_partial(folder: Path) -> None:
    for path in filter(is_partial, folder.iterdir()):
        path.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
