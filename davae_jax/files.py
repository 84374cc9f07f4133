"""Files that appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
