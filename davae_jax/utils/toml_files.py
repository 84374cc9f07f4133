"""Reads TOML files that may be damaged, foreign or huge."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from davae_jax.utils.errors import InputError, first_line
from davae_jax.utils.files import read_bounded

MAX_BYTES = 1 << 16  # of a file: settings have a few hundred; the time to read a dotted key is quadratic


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the values of a TOML file.

    Raises:
      InputError: the file cannot be read, is too large, or is not TOML (exit code 2); the message names it.
    """
    try:
        return tomllib.loads(read_bounded(path, MAX_BYTES, pipes=True).decode("utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})", exit_code=2) from None
    except InputError as e:
        raise InputError(str(e), exit_code=2) from None
    except (ValueError, RecursionError) as e:  # not TOML, or not UTF-8
        raise InputError(f"{path}: is not TOML ({first_line(e)})", exit_code=2) from None
