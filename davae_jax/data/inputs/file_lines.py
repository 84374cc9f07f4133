"""Names lines that are counted over several files."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class FileLines(NamedTuple):
    """Files, and the number of the first line of each, in ascending order.

    A file that continues earlier work begins at a number below 1.
    """

    files: list[str]
    first_lines: list[int]

    def locate(self, number: int) -> tuple[str, int]:
        """Returns the file that contains a line, and the line's number in it, from 1."""
        i = bisect.bisect_right(self.first_lines, number) - 1
        return self.files[i], number - self.first_lines[i] + 1

    def describe(self, numbers: Iterable[int]) -> str:
        """Returns files and line numbers for messages: "lines 1, 8 of a.txt; lines 1 of b.txt"."""
        lines: dict[str, list[int]] = {}
        for file, line in map(self.locate, numbers):
            lines.setdefault(file, []).append(line)
        return describe_lines(lines)


def files_of(stats: dict[str, Any]) -> FileLines:
    """Returns the files of a shard from its statistics or its entry in the manifest."""
    if "files" in stats:
        return FileLines(*map(list, zip(*stats["files"], strict=True)))
    return FileLines([stats["file"]], [1 - stats.get("line", 0)])  # one file, and the number of its lines before it


def name_files(files: Sequence[object]) -> str:
    """Returns the names of files for messages, of many only the first three."""
    more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
    return ", ".join(map(str, files[:3])) + more


def describe_lines(lines: dict[str, list[int]]) -> str:
    """Returns the line numbers in several files for messages."""
    return "; ".join(f"lines {', '.join(map(str, numbers))} of {file}" for file, numbers in lines.items())
