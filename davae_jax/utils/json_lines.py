"""Reads the JSON Lines files that this project writes: logs of runs and held-out texts.

Only the byte "\\n" ends a line. A text may contain U+2028 and other characters at which `str.splitlines` splits.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MAX_LINE_BYTES = 1 << 27  # of a line: a text of 16 MiB, of which every byte is escaped, takes 96


class JsonLine(NamedTuple):
    number: int  # from 1
    data: bytes  # with its line feed; of a line that is too long, the beginning
    values: dict[str, Any] | None  # None: the line is damaged or incomplete


def iterate_json_lines(path: Path) -> Iterator[JsonLine]:
    """Yields every line of a file. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            data = file.readline(MAX_LINE_BYTES)
            if not data:
                return
            yield JsonLine(number, data, _parse(data))
            while len(data) == MAX_LINE_BYTES and not data.endswith(b"\n"):
                data = file.readline(MAX_LINE_BYTES)


def read_log_lines(path: Path, *, may_grow: bool = False) -> list[JsonLine]:
    """Returns the lines of a run's log that `has_step` accepts; [] if there is no such file.

    Other lines are skipped with one warning. They are what a killed run, a full disk or a crash of the system leaves,
    and must not keep a run from being resumed.

    Args:
      may_grow: the run may be writing the file, so that no warning is given of an incomplete last line.
    """
    if not path.exists():
        return []
    intact, damaged = [], []
    for line in iterate_json_lines(path):
        (intact if has_step(line) else damaged).append(line)
    if may_grow and damaged and not damaged[-1].data.endswith(b"\n"):
        damaged.pop()
    if damaged:
        others = f" and {len(damaged) - 1} others are" if damaged[1:] else " is"
        warnings.warn(f"{path}: line {damaged[0].number}{others} damaged and ignored", stacklevel=2)
    return intact


def has_step(line: JsonLine) -> bool:
    """Returns whether a line of a run's log is intact: an object with the number of a step."""
    step = line.values.get("step") if line.values else None
    return type(step) is int and 0 <= step < 1 << 62


def _parse(data: bytes) -> dict[str, Any] | None:
    """Returns the object of a line, or None if it is damaged or has no line feed."""
    if not data.endswith(b"\n"):
        return None
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
