"""Reads JSON files that may be damaged, foreign or huge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

from davae_jax.utils.errors import InputError, first_line

MAX_BYTES = 1 << 26  # of a file: 64 MiB


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      InputError: the file cannot be read, is too large, or does not contain a JSON object; the message names it.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: is larger than {MAX_BYTES >> 20} MiB")
        values = json.loads(path.read_bytes().decode("utf-8"))
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
    if not isinstance(values, dict):
        raise InputError(f"{path}: does not contain a JSON object")
    return values


def json_sum(values: Any) -> int:
    """Returns the CRC-32 of JSON values, whatever the order of their keys."""
    return crc32(json.dumps(values, sort_keys=True).encode())
