"""Files of texts, read a piece at a time: plain text, JSON Lines, Parquet, Arrow.

Memory is that of a chunk of lines (of Parquet, a row group), whatever the file's size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from davae_jax.data.line_readers import (
    CHUNK_BYTES,
    CHUNK_LINES,
    Chunk,
    FileSlice,
    _decompressed,
    _line,
    _lines_between,
    _part_read,
)
from davae_jax.data.table_readers import _read_arrow, _read_parquet, _row_groups
from davae_jax.utils.errors import InputError, first_line

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
LINE_SUFFIXES = (".txt", *JSON_SUFFIXES)
PACKED_SUFFIXES = (".gz", ".zst")
TABLE_SUFFIXES = (".parquet", ".arrow")
KNOWN = f"{', '.join(LINE_SUFFIXES)}, each also with {' or '.join(PACKED_SUFFIXES)}; {', '.join(TABLE_SUFFIXES)}"
# What lies beside the data in a Hugging Face dataset folder.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves and those in folders, in the order of their names.

    A folder gives the files of one kind, other than hidden ones and a dataset's metadata.

    Raises:
      InputError: there is none, or one of no known kind, or a folder has several kinds (exit code 2).
    """
    files: set[Path] = set()
    for path in paths:
        if path.is_dir():
            files |= _files_in(path)
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder", exit_code=2)
        elif _kind(path) is None:
            raise InputError(f"{path}: unknown suffix; known: {KNOWN}", exit_code=2)
        else:
            files.add(path)
    return sorted(files, key=str)


def _files_in(folder: Path) -> set[Path]:
    files = {
        path
        for path in folder.rglob("*")
        if path.is_file() and _kind(path) and path.name not in METADATA
        if not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    }
    kinds = sorted({_kind(path) for path in files})
    if not kinds:
        raise InputError(f"{folder}: holds no file of a known kind: {KNOWN}", exit_code=2)
    if len(kinds) > 1:
        raise InputError(f"{folder}: holds files of several kinds ({', '.join(kinds)}); name the files", exit_code=2)
    return files


def _kind(path: Path) -> str | None:
    """`text`, `json`, `parquet` or `arrow`."""
    name = path.name.lower()
    if name.endswith(TABLE_SUFFIXES):
        return name.rsplit(".", 1)[1]
    for suffix in PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    if name.endswith(JSON_SUFFIXES):
        return "json"
    return "text" if name.endswith(LINE_SUFFIXES) else None


def _is_compressed(path: Path) -> bool:
    return path.name.lower().endswith(PACKED_SUFFIXES)


def split_into_slices(path: Path, at_most: int) -> list[FileSlice]:
    """The pieces of a file: of `at_most` bytes where it can be divided. Raises InputError where it cannot be read."""
    with _reading(path):
        size = path.stat().st_size
        if _kind(path) == "parquet":
            bounds = _row_groups(path, at_most)
        elif _is_compressed(path) or _kind(path) == "arrow":
            return [FileSlice(str(path), 0, None, size)]
        else:
            n = max(1, -(-size // at_most))
            bounds = [size * i // n for i in range(n + 1)]
    whole = max(1, bounds[-1] - bounds[0])
    return [
        FileSlice(str(path), start, end, round(size * (end - start) / whole))
        for start, end in itertools.pairwise(bounds)
    ]


def read_slice(piece: FileSlice, field: str) -> Iterator[Chunk]:
    """All lines of a piece. A table's rows count as lines.

    Raises:
      InputError: the file cannot be read, is damaged, or is a table without that column.
    """
    path = Path(piece.file)
    read = {"parquet": _read_parquet, "arrow": _read_arrow}.get(_kind(path), _read_lines)
    with _reading(path):
        yield from read(piece, path, field)


class _reading:
    """Turns what readers raise on a damaged file into InputError; each has types of its own."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, _) -> None:
        if isinstance(error, Exception) and not isinstance(error, InputError):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
            raise InputError(f"{self.path}: cannot be read ({reason})") from error


def _read_lines(piece: FileSlice, path: Path, field: str) -> Iterator[Chunk]:
    is_json = _kind(path) == "json"
    with path.open("rb") as raw, _decompressed(raw, path) as file:
        lines, text_bytes, first = [], 0, piece.start == 0
        for data in _lines_between(file, piece):
            if first and data is not None:
                data = data.removeprefix(b"\xef\xbb\xbf")
            first = False
            lines.append(_line(data, field if is_json else None))
            text_bytes += len(data or b"")
            if len(lines) == CHUNK_LINES or text_bytes >= CHUNK_BYTES:
                yield Chunk(lines, text_bytes, _part_read(raw, piece))
                lines, text_bytes = [], 0
        if lines:
            yield Chunk(lines, text_bytes, 1.0)
