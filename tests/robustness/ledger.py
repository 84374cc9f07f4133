"""Keeps the verdict of every case in a file of JSON Lines, so that a long run goes on where it was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """The verdict of a case.

    Attributes:
      case: KIND/FAMILY/NUMBER, for `--repeat`.
      verdict: "accepted", "refused", "fault", or "not run".
      faults: what is wrong.
      done: what was done to the input.
      error: the program's error in one line.
    """

    case: str
    verdict: str
    faults: list[str]
    done: str = ""
    error: str = ""
    seconds: float = 0.0
    memory: int = 0
    attempts: int = 1  # of a kill round, the number of kills


class Ledger:
    """The file. Several processes may append to it."""

    def __init__(self, path: Path):
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, verdict: Verdict) -> None:
        os.write(self._file, (json.dumps(verdict._asdict()) + "\n").encode())

    def read(self) -> Iterator[Verdict]:
        """Yields the last verdict of each case. A line that a kill has cut off is left out."""
        verdicts: dict[str, Verdict] = {}
        for line in self._path.read_bytes().split(b"\n"):
            try:
                values: dict[str, Any] = json.loads(line)
                verdicts[values["case"]] = Verdict(**values)
            except (ValueError, TypeError, KeyError):
                continue
        yield from verdicts.values()
