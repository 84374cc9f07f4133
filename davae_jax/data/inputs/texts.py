"""Decodes lines of text and of JSON Lines."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

from davae_jax.data.inputs.encodings import HEAD_BYTES, UTF_8, check_head, recode_bytes
from davae_jax.utils.errors import InputError


def parse_json_text(line: str, fields: Sequence[str]) -> str:
    """Returns the text in the fields of a line of JSON Lines; an empty string for a blank line.

    Raises:
      ValueError: the line is not JSON or lacks a string in one of the fields.
    """
    try:
        # The line may be the first of a file that was appended to another.
        values = json.loads(line.removeprefix("\ufeff")) if line.strip() else dict.fromkeys(fields, "")
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    return join_fields(values, fields)


def join_fields(values: Any, fields: Sequence[str]) -> str:
    """Returns the texts in the fields of a JSON object, joined by line feeds.

    Of several fields, those that are blank, null or missing are left out, unless all are missing.

    Raises:
      ValueError: the object lacks the fields, or one of them is not a string.
    """
    if len(fields) > 1 and isinstance(values, dict):
        fields = [field for field in fields if values.get(field) is not None] or fields[:1]
    texts = [_text_of(values, field) for field in fields]
    return texts[0] if len(texts) == 1 else "\n".join(text for text in texts if text.strip())


def _text_of(values: Any, field: str) -> str:
    try:
        text = values[field]
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"has no field {field!r}") from None
    if not isinstance(text, str):
        raise ValueError(f"the field {field!r} is not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"the field {field!r} contains half of a surrogate pair") from None
    return text


def warn_of_form(beginning: bytes, name: str) -> None:
    """Warns of plain text, of which these are the first bytes in UTF-8, that is probably not one text per line."""
    first, line_feed, _ = beginning.partition(b"\n")
    if not line_feed and b"\r" in first.rstrip(b"\r"):
        form = "its lines end in carriage returns alone, which end no text; replace them by line feeds"
    elif first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") and _is_json_object(first):
        form = "its first line is a JSON object; JSON Lines are read from files whose names end in .jsonl"
    else:
        return
    warnings.warn(f"{name}: is read as plain text, but {form}", stacklevel=3)


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def decode_lines(data: bytes, name: str, encoding: str = UTF_8) -> list[str]:
    """Returns the lines of a text. Only line feeds end a line, with or without a carriage return before them.

    Raises:
      InputError: a line is not in this encoding; the message begins with `name` and contains the line number.
    """
    check_head(data[:HEAD_BYTES], name, encoding)
    try:
        data = recode_bytes(data, encoding) if encoding != UTF_8 else data
    except ValueError as e:
        raise InputError(f"{name}: cannot be read ({e})") from None
    warn_of_form(data, name)
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError:
            raise InputError(f"{name}: line {number}: is not {encoding.upper()}") from None
    return texts
