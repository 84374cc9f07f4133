"""Texts from a file that fits in memory."""

from __future__ import annotations

import json
from pathlib import Path

from davae_jax.utils.errors import InputError


def read_texts(path: Path, field: str = "text") -> list[str]:
    """One text a line; of JSON Lines (`.jsonl`, `.json`), the field of each line. Blank lines are empty texts.

    Raises:
      InputError: no such file, an empty one, or a line that is not UTF-8 or not JSON with that field, by its number.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    lines = decode_lines(data, str(path))
    if not any(line.strip() for line in lines):
        raise InputError(f"{path}: holds no text")
    if path.suffix not in (".jsonl", ".json"):
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(parse_json_text(line, field))
        except ValueError as e:
            raise InputError(f"{path}: line {number}{e}") from None
    if not any(text.strip() for text in texts):
        raise InputError(f"{path}: holds no text")
    return texts


def parse_json_text(line: str, field: str) -> str:
    """The field of a line of JSON; of a blank line, an empty text.

    Raises:
      ValueError: what is wrong, to be said behind the line's number.
    """
    try:
        text = json.loads(line)[field] if line.strip() else ""
    except (ValueError, RecursionError):
        raise ValueError(" is not JSON") from None
    except (KeyError, TypeError, IndexError):
        raise ValueError(f" has no field {field!r}") from None
    if not isinstance(text, str):
        raise ValueError(f": the field {field!r} is not a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f": the field {field!r} holds half of a surrogate pair") from None
    return text


def decode_lines(data: bytes, name: str) -> list[str]:
    """The lines of UTF-8 bytes, split at line feeds alone. Raises InputError naming a line that is not UTF-8."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError:
            raise InputError(f"{name}: line {number} is not UTF-8") from None
    return texts
