"""Reads the texts of a file that fits in memory."""

from __future__ import annotations

import json
from pathlib import Path

from davae_jax.utils.errors import InputError

JSON_LINES_SUFFIXES = (".jsonl", ".json")


def read_texts(path: Path, field: str = "text") -> list[str]:
    """Returns the text of every line: the line itself, or its field in JSON Lines. A blank line gives an empty string.

    Raises:
      InputError: the file cannot be read or contains no text, or a line is not UTF-8 or lacks a string in this field;
        the message contains the line number.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    texts = decode_lines(data, str(path))
    if path.suffix in JSON_LINES_SUFFIXES:
        for i, line in enumerate(texts):
            try:
                texts[i] = parse_json_text(line, field)
            except ValueError as e:
                raise InputError(f"{path}: line {i + 1}: {e}") from None
    if not any(text.strip() for text in texts):
        raise InputError(f"{path}: contains no text")
    return texts


def parse_json_text(line: str, field: str) -> str:
    """Returns the text in a field of a line of JSON Lines; an empty string for a blank line.

    Raises:
      ValueError: the line is not JSON or lacks a string in this field.
    """
    try:
        text = json.loads(line)[field] if line.strip() else ""
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"has no field {field!r}") from None
    if not isinstance(text, str):
        raise ValueError(f"the field {field!r} is not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"the field {field!r} contains half of a surrogate pair") from None
    return text


def decode_lines(data: bytes, name: str) -> list[str]:
    """Returns the lines of UTF-8 bytes. Only line feeds end a line, with or without a carriage return before them.

    Raises:
      InputError: a line is not UTF-8; the message begins with `name` and contains the line number.
    """
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
