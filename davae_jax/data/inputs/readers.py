"""Reads files of texts: whole, for a run, or in slices, for `davae prepare`.

`FORMATS` is the table of the formats that all commands read; add a format there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from davae_jax.data.inputs.encodings import UTF_8
from davae_jax.data.inputs.file_lines import name_files
from davae_jax.data.inputs.line_readers import (
    DECOMPRESSORS,
    Chunk,
    FileSlice,
    check_beginning,
    is_json_array,
    parse_line,
    read_json,
    read_plain_lines,
)
from davae_jax.data.inputs.table_readers import parquet_slice_bounds, read_arrow, read_parquet
from davae_jax.utils.errors import InputError, OptionError, first_line
from davae_jax.utils.files import resolve
from davae_jax.utils.json_files import read_json_object


def byte_slice_bounds(path: Path, max_bytes: int) -> list[int]:
    """Returns the byte offsets at which slices begin, followed by the size of the file."""
    size = path.stat().st_size
    n = max(1, -(-size // max_bytes))
    return [size * i // n for i in range(n + 1)]


def json_slice_bounds(path: Path, max_bytes: int) -> list[int]:
    """Returns the byte offsets at which slices begin, followed by the size of the file; an array is one slice."""
    return [0, path.stat().st_size] if is_json_array(path) else byte_slice_bounds(path, max_bytes)


class InputFormat(NamedTuple):
    """A format of input files.

    Attributes:
      name: the name in messages; all files of a folder must have the same format.
      read: yields the texts of a slice of a file, given the slice and the names of the fields or columns.
      slice_bounds: returns the beginnings of a file's slices and the end of the last one, given the file and the
        maximum number of bytes per slice; None for a format that can only be read from its beginning.
      compressible: whether a suffix of `DECOMPRESSORS` may follow that of the format.
    """

    name: str
    read: Callable[[FileSlice, Sequence[str]], Iterator[Chunk]]
    slice_bounds: Callable[[Path, int], list[int]] | None = None
    compressible: bool = False


_JSON = InputFormat("json", read_json, json_slice_bounds, compressible=True)
FORMATS = {
    ".txt": InputFormat("text", read_plain_lines, byte_slice_bounds, compressible=True),
    ".jsonl": _JSON,
    ".json": _JSON,
    ".ndjson": _JSON,
    ".parquet": InputFormat("parquet", read_parquet, parquet_slice_bounds),
    ".arrow": InputFormat("arrow", read_arrow),
}
# Files in a Hugging Face dataset folder that are not data.
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

DOCUMENTS = ("README", "LICENSE")  # files without a suffix, or of any, that explain a folder of data


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


def is_plain_text(path: Path) -> bool:
    """Returns whether a file is plain text by its suffix, and not compressed. Unknown suffixes are plain text."""
    return _format_of(path) is FORMATS[".txt"] and path.suffix.lower() not in DECOMPRESSORS


def find_files(paths: Sequence[Path], *, any_suffix: bool = False) -> list[Path]:
    """Returns the given files and the files in the given folders, each once, sorted by path.

    A folder contributes all files of one format, in its subfolders too (`_walk`), with a warning of other files. Of
    several spellings of a path, such as a relative and an absolute one, the first is returned; links are not resolved.

    Args:
      any_suffix: a given file with an unknown suffix, a pipe for example, is plain text.

    Raises:
      InputError: a path does not exist, a file has an unknown suffix, or a folder contains no file of a supported
        format or files of several formats (exit code 2).
    """
    files: set[Path] = set()
    for path in paths:
        if path.is_dir():
            files |= _files_in(path)
        elif any_suffix:
            files.add(path)
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder", exit_code=2)
        elif find_format(path) is None:
            raise InputError(f"{path}: unknown suffix; supported: {known_suffixes()}", exit_code=2)
        else:
            files.add(path)
    spellings: dict[str, Path] = {}
    for path in sorted(files, key=str):
        spellings.setdefault(os.path.abspath(path), path)
    return list(spellings.values())


def check_outside(output: Path, inputs: Iterable[Path], option: str) -> None:
    """Raises OptionError if an output folder is inside an input folder: its files would be texts at the next start.

    A hidden folder may be there, because `find_files` leaves it out.
    """
    for path in inputs:
        if path.is_dir() and (target := resolve(output)).is_relative_to(folder := path.resolve()):
            parts = target.relative_to(folder).parts
            if not any(part.startswith(".") for part in parts):
                raise OptionError(option, f"{output} is inside the input folder {path}; choose another folder")


def _files_in(folder: Path) -> set[Path]:
    formats = {path: find_format(path) for path in _walk(folder)}
    files = {path for path, input_format in formats.items() if input_format}
    names = sorted({formats[path].name for path in files})
    if not names:
        raise InputError(f"{folder}: contains no file of a supported format: {known_suffixes()}", exit_code=2)
    if len(names) > 1:
        raise InputError(
            f"{folder}: contains files of several formats ({', '.join(names)}); list the files themselves", exit_code=2
        )
    others = sorted(path for path in formats if path not in files and not path.name.startswith("_"))
    if others := [path for path in others if path.stem.upper() not in DOCUMENTS]:
        warnings.warn(f"{name_files(others)}: left out, because the suffix is not supported", stacklevel=4)
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the files of a folder and its subfolders, except hidden ones and the metadata of a Hugging Face dataset.

    Links are followed, each folder once.

    Raises:
      InputError: a folder cannot be read, a link leads nowhere, or a name marks a temporary file. None of them may be
        missing from the texts unnoticed.
    """

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})", exit_code=2)

    visited = set()
    for name, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(name)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(subfolder for subfolder in folders if not subfolder.startswith("."))
        listed = _listed_in_state(Path(name))
        for file in sorted([*folders, *files]):
            path = Path(name) / file
            if file.startswith(".") or file in METADATA_FILES or (listed is not None and file not in listed):
                continue
            if not path.exists():
                raise InputError(f"{path}: the link leads nowhere", exit_code=2)
            if file.startswith("_") and (path.is_dir() or find_format(path)):
                reason = "is not read, because names with _ mark temporary files; rename it, or remove it"
                raise InputError(f"{path}: {reason}", exit_code=2)
            if path.is_file():
                yield path
            elif find_format(path) and not path.is_dir():
                raise InputError(f"{path}: is neither a file nor a folder; remove it, or list the files", exit_code=2)


def _listed_in_state(folder: Path) -> set[str] | None:
    """Returns the files of a dataset that the `datasets` library saved; None if the folder is none.

    Other files of such a folder, cache-*.arrow, contain the same rows again.

    Raises:
      InputError: state.json is damaged, or names a file that is missing.
    """
    path = folder / "state.json"
    try:
        values = read_json_object(path)
        entries = values.get("_data_files")
        if entries is None:
            return None
        files = {entry["filename"] for entry in entries}
        missing = [file for file in files if not (folder / file).is_file()]
    except FileNotFoundError:
        return None
    except (LookupError, TypeError, ValueError, OSError) as e:
        reason = str(e) if isinstance(e, InputError) else f"{path}: the list _data_files is damaged"
        raise InputError(f"{reason}; restore or remove it", exit_code=2) from None
    if missing or not files:
        problem = f"names {min(missing)!r}, which is not in the folder" if missing else "names no file of texts"
        raise InputError(f"{path}: {problem}", exit_code=2)
    if values.get("_indices_data_files"):  # rows that filter, select or shuffle chose; datasets 1 saved their numbers
        raise InputError(
            f"{path}: names only some rows of the files; call flatten_indices() and save again", exit_code=2
        )
    return files


def read_texts(path: Path, fields: str | Sequence[str] = "text", encoding: str = UTF_8) -> list[str]:
    """Returns all texts of a file that fits in memory. A blank line gives an empty string.

    A file with an unknown suffix, or none, is plain text.

    Args:
      fields: the field of JSON, or the column of a table, that contains the text; several are joined by line feeds.

    Raises:
      InputError: the file cannot be read or contains no text, or a line is not in this encoding, is too long or lacks a
        string in these fields; the message contains the line number.
    """
    return _some(path, list(iterate_texts(path, fields, encoding)))


def iterate_texts(path: Path, fields: str | Sequence[str] = "text", encoding: str = UTF_8) -> Iterator[str]:
    """Yields the texts of a file of any size, as `read_texts` returns them, or none if it contains none."""
    fields = [fields] if isinstance(fields, str) else fields
    return _strictly(path, read_file(path, fields, encoding))


def parse_texts(path: Path, lines: Sequence[str], fields: str | Sequence[str] = "text") -> list[str]:
    """Returns the texts of all lines of a file of JSON Lines, which `read_lines` has read. Raises as `read_texts`."""
    fields = [fields] if isinstance(fields, str) else fields
    chunk = Chunk([parse_line(line.encode("utf-8"), fields) for line in lines], 0, 1.0)
    return _some(path, list(_strictly(path, [chunk])))


def _some(path: Path, texts: list[str]) -> list[str]:
    if not any(text.strip() for text in texts):
        raise InputError(f"{path}: contains no text")
    return texts


def read_lines(path: Path, encoding: str = UTF_8) -> list[str]:
    """Returns all lines of a file of plain text or JSON Lines. Raises InputError as `read_texts` does."""
    with _naming_file(path):
        check_beginning(path, encoding)
        chunks = read_plain_lines(FileSlice(str(path), 0, None, path.stat().st_size, encoding), ())
        return list(_strictly(path, chunks))


def _strictly(path: Path, chunks: Iterable[Chunk]) -> Iterator[str]:
    """Yields the texts of a file. Raises InputError at the first line that cannot be read."""
    lines = (line for chunk in chunks for line in chunk.lines)
    for number, (text, problem) in enumerate(lines, 1):
        if problem:
            raise InputError(f"{path}: line {number}: {problem}")
        yield text


def read_file(path: Path, fields: Sequence[str], encoding: str = UTF_8) -> Iterator[Chunk]:
    """Yields all lines of a file in chunks, as `read_slice` does. A file with an unknown suffix is plain text."""
    for file_slice in split_into_slices(path, sys.maxsize, encoding):
        yield from read_slice(file_slice, fields)


def split_into_slices(path: Path, max_bytes: int, encoding: str = UTF_8) -> list[FileSlice]:
    """Returns the slices of a file, of about `max_bytes` each if it can be split.

    Raises:
      InputError: the file cannot be read, or is recognized as one of another encoding or kind.
    """
    input_format = _format_of(path)
    with _naming_file(path):
        size = path.stat().st_size
        if input_format.compressible:
            check_beginning(path, encoding, is_text=input_format is FORMATS[".txt"])
        compressed_or_recoded = input_format.compressible and (
            path.suffix.lower() in DECOMPRESSORS or encoding != UTF_8  # of UTF-16, say, a line can begin at any byte
        )
        if input_format.slice_bounds is None or compressed_or_recoded or not path.is_file():
            return [FileSlice(str(path), 0, None, size, encoding)]
        bounds = input_format.slice_bounds(path, max_bytes)
    total = max(1, bounds[-1] - bounds[0])
    return [
        FileSlice(str(path), start, end, round(size * (end - start) / total))
        for start, end in itertools.pairwise(bounds)
    ]


def read_slice(file_slice: FileSlice, fields: Sequence[str]) -> Iterator[Chunk]:
    """Yields all lines of a slice in chunks; the rows of a table and the objects of a JSON array are its lines.

    Raises:
      InputError: the file cannot be read, is damaged, or is a table that lacks a column of strings.
    """
    path = Path(file_slice.file)
    with _naming_file(path):
        yield from _format_of(path).read(file_slice, fields)


def _format_of(path: Path) -> InputFormat:
    return find_format(path) or FORMATS[".txt"]


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
