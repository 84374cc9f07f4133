"""Finds the input files of `davae prepare`, splits them into slices, and reads a slice.

`FORMATS` is the table of supported formats; add a format there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from davae_jax.data.line_readers import DECOMPRESSORS, Chunk, FileSlice, read_json_lines, read_plain_lines
from davae_jax.data.table_readers import parquet_slice_bounds, read_arrow, read_parquet
from davae_jax.utils.errors import InputError, first_line


def byte_slice_bounds(path: Path, max_bytes: int) -> list[int]:
    """Returns the byte offsets at which slices begin, followed by the size of the file."""
    size = path.stat().st_size
    n = max(1, -(-size // max_bytes))
    return [size * i // n for i in range(n + 1)]


class InputFormat(NamedTuple):
    """A format of input files.

    Attributes:
      name: the name in messages; all files of a folder must have the same format.
      read: yields the texts of a slice of a file, given the slice and the name of the field or column.
      slice_bounds: returns the beginnings of a file's slices and the end of the last one, given the file and the
        maximum number of bytes per slice; None for a format that can only be read from its beginning.
      compressible: whether a suffix of `DECOMPRESSORS` may follow that of the format.
    """

    name: str
    read: Callable[[FileSlice, str], Iterator[Chunk]]
    slice_bounds: Callable[[Path, int], list[int]] | None = None
    compressible: bool = False


_JSON_LINES = InputFormat("json", read_json_lines, byte_slice_bounds, compressible=True)
FORMATS = {
    ".txt": InputFormat("text", read_plain_lines, byte_slice_bounds, compressible=True),
    ".jsonl": _JSON_LINES,
    ".json": _JSON_LINES,
    ".ndjson": _JSON_LINES,
    ".parquet": InputFormat("parquet", read_parquet, parquet_slice_bounds),
    ".arrow": InputFormat("arrow", read_arrow),
}
# Files in a Hugging Face dataset folder that are not data.
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def known_suffixes() -> str:
    """Returns the suffixes of all formats, for messages."""
    compressible = [suffix for suffix, input_format in FORMATS.items() if input_format.compressible]
    others = [suffix for suffix in FORMATS if suffix not in compressible]
    return f"{', '.join(compressible)}, each also with {' or '.join(DECOMPRESSORS)}; {', '.join(others)}"


def find_format(path: Path) -> InputFormat | None:
    """Returns the format of a file by its suffix; None if the suffix is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compressed = bool(suffixes) and suffixes[-1] in DECOMPRESSORS
    if compressed:
        suffixes.pop()
    input_format = FORMATS.get(suffixes[-1]) if suffixes else None
    return None if input_format and compressed and not input_format.compressible else input_format


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Returns the given files and the files in the given folders, sorted by path.

    A folder contributes all files of one format, in its subfolders too, except hidden files and the metadata of a
    Hugging Face dataset.

    Raises:
      InputError: a path does not exist, a file has an unknown suffix, or a folder contains no file of a supported
        format or files of several formats (exit code 2).
    """
    files: set[Path] = set()
    for path in paths:
        if path.is_dir():
            files |= _files_in(path)
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder", exit_code=2)
        elif find_format(path) is None:
            raise InputError(f"{path}: unknown suffix; supported: {known_suffixes()}", exit_code=2)
        else:
            files.add(path)
    return sorted(files, key=str)


def _files_in(folder: Path) -> set[Path]:
    formats = {
        path: find_format(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in METADATA_FILES
        if not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    }
    files = {path for path, input_format in formats.items() if input_format}
    names = sorted({formats[path].name for path in files})
    if not names:
        raise InputError(f"{folder}: contains no file of a supported format: {known_suffixes()}", exit_code=2)
    if len(names) > 1:
        raise InputError(
            f"{folder}: contains files of several formats ({', '.join(names)}); list the files themselves", exit_code=2
        )
    return files


def split_into_slices(path: Path, max_bytes: int) -> list[FileSlice]:
    """Returns the slices of a file, of about `max_bytes` each if the format can be split.

    Raises:
      InputError: the file cannot be read.
    """
    with _naming_file(path):
        size = path.stat().st_size
        slice_bounds = find_format(path).slice_bounds
        if slice_bounds is None or path.suffix.lower() in DECOMPRESSORS:
            return [FileSlice(str(path), 0, None, size)]
        bounds = slice_bounds(path, max_bytes)
    total = max(1, bounds[-1] - bounds[0])
    return [
        FileSlice(str(path), start, end, round(size * (end - start) / total))
        for start, end in itertools.pairwise(bounds)
    ]


def read_slice(file_slice: FileSlice, field: str) -> Iterator[Chunk]:
    """Yields all lines of a slice in chunks; the rows of a table are its lines.

    Raises:
      InputError: the file cannot be read, is damaged, or is a table without a string column `field`.
    """
    path = Path(file_slice.file)
    with _naming_file(path):
        yield from find_format(path).read(file_slice, field)


@contextlib.contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    """Turns any exception into an InputError that names the file; readers raise many types for damaged data."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else first_line(e)
        raise InputError(f"{path}: cannot be read ({reason})") from e
