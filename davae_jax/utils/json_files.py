"""Reads JSON files that may be damaged, foreign or huge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

from davae_jax.utils.errors import InputError, first_line
from davae_jax.utils.files import read_bounded

MAX_BYTES = 1 << 24  # of a file: 16 MiB, which take up to 7 s and 0.5 GB; those of prepared texts may be larger
SUM = "sum"  # the key of the sum that values carry of themselves
MAX_DEPTH = 100  # of objects and lists in each other; copying or comparing deeper ones fails in Python's recursion


def read_json_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Returns the object in a JSON file of at most so many bytes.

    Raises:
      FileNotFoundError: there is no such file.
      InputError: the file cannot be read, is too large, or does not contain a JSON object; the message names it.
    """
    try:
        values = json.loads(read_bounded(path, max_bytes).decode("utf-8"))
    except FileNotFoundError:
        raise
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except InputError:
        raise
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({first_line(e)})") from None
    if _is_deeper(values, MAX_DEPTH):
        raise InputError(f"{path}: is nested more than {MAX_DEPTH} levels deep")
    if not isinstance(values, dict):
        raise InputError(f"{path}: does not contain a JSON object")
    return values


def json_sum(values: Any) -> int:
    """Returns the CRC-32 of JSON values, whatever the order of their keys."""
    return crc32(json.dumps(values, sort_keys=True).encode())


def with_sum(values: dict[str, Any]) -> dict[str, Any]:
    """Returns values that carry their own sum, which is computed anew if they have one."""
    return values | {SUM: json_sum(_without_sum(values))}


def has_right_sum(values: dict[str, Any]) -> bool:
    """Returns whether values carry their own sum, and are what they were when `with_sum` added it."""
    return values.get(SUM) == json_sum(_without_sum(values))


def has_wrong_sum(values: dict[str, Any]) -> bool:
    """Returns whether values carry a sum that is not theirs. Those of earlier versions carry none."""
    return SUM in values and not has_right_sum(values)


def _without_sum(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != SUM}


def _is_deeper(values: Any, depth: int) -> bool:
    """Returns whether objects and lists are nested in more than `depth` levels."""
    level = [values]
    for _ in range(depth + 1):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return False
    return True
