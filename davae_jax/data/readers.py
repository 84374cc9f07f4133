"""Files of texts, read a piece at a time: plain text, JSON Lines, Parquet, Arrow.

Memory is that of a chunk of lines (of Parquet, a row group), whatever the file's size.
"""

from __future__ import annotations

import gzip
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from davae_jax.data.texts import parse_json_text
from davae_jax.utils.errors import InputError, first_line

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
LINE_SUFFIXES = (".txt", *JSON_SUFFIXES)
PACKED_SUFFIXES = (".gz", ".zst")
TABLE_SUFFIXES = (".parquet", ".arrow")
KNOWN = f"{', '.join(LINE_SUFFIXES)}, each also with {' or '.join(PACKED_SUFFIXES)}; {', '.join(TABLE_SUFFIXES)}"
# What lies beside the data in a Hugging Face dataset folder.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
LONGEST_LINE = 1 << 24  # bytes; what is longer is no line of text, and would have to be held in memory
CHUNK_LINES, CHUNK_BYTES = 1000, 1 << 20


class FileSlice(NamedTuple):
    """A part of a file that is read in one go.

    Plain and JSON lines: those that begin in the bytes from `start` to `end`. Parquet: the row groups from `start` to
    `end`. What cannot be entered in the middle: the whole file, and `end` is None.
    """

    file: str
    start: int
    end: int | None
    size: int  # bytes of the file, for the progress bar


class Line(NamedTuple):
    """A text, or what is wrong with the line."""

    text: str | None
    problem: str | None = None


class Chunk(NamedTuple):
    lines: list[Line]
    text_bytes: int
    done: float  # what part of the piece has been read, from 0 to 1


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


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".zst":
            zstandard = _import("zstandard", path)
            return io.BufferedReader(_ZstdStream(raw, zstandard), CHUNK_BYTES)
    return raw


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of all frames of a file. The library's own reader takes a cut file for a short one."""

    def __init__(self, raw: BinaryIO, zstandard: Any):
        self._raw, self._new = raw, zstandard.ZstdDecompressor
        self._frame = self._new().decompressobj()
        self._packed, self._ready, self._begun = b"", b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            packed = self._packed or self._raw.read(1 << 17)
            self._packed = b""
            if not packed:
                if self._begun:
                    raise EOFError("the compressed file ends too early")
                return 0
            self._ready, self._begun = self._frame.decompress(packed), True
            if self._frame.eof:
                self._packed, self._begun = self._frame.unused_data, False
                self._frame = self._new().decompressobj()
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n


def _lines_between(file: BinaryIO, piece: FileSlice) -> Iterator[bytes | None]:
    """The lines that begin in the piece, without their end; None for one that is too long."""
    place = piece.start
    if place:  # the line that begins before belongs to the piece before
        file.seek(place - 1)
        place += _skip_line(file) - 1
    while piece.end is None or place < piece.end:
        data = file.readline(LONGEST_LINE)
        if not data:
            return
        place += len(data)
        if len(data) == LONGEST_LINE and not data.endswith(b"\n"):
            place += _skip_line(file)
            yield None
        else:
            yield data.removesuffix(b"\n").removesuffix(b"\r")


def _skip_line(file: BinaryIO) -> int:
    """Reads to the end of the line; returns how many bytes that were."""
    skipped = 0
    while data := file.readline(LONGEST_LINE):
        skipped += len(data)
        if data.endswith(b"\n"):
            break
    return skipped


def _part_read(raw: BinaryIO, piece: FileSlice) -> float:
    end = piece.size if piece.end is None else piece.end
    return min(1.0, (raw.tell() - piece.start) / max(1, end - piece.start))


def _line(data: bytes | None, field: str | None) -> Line:
    if data is None:
        return Line(None, f"is longer than {LONGEST_LINE >> 20} MiB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Line(None, "is not UTF-8")
    if field is None:
        return Line(text)
    try:
        return Line(parse_json_text(text, field))
    except ValueError as e:
        return Line(None, str(e).lstrip(": "))


def _row_groups(path: Path, at_most: int) -> list[int]:
    """The row groups that pieces begin with, and the number of all."""
    metadata = _import("pyarrow.parquet", path).ParquetFile(path).metadata
    bounds, size = [0], 0
    for i in range(metadata.num_row_groups):
        size += metadata.row_group(i).total_byte_size
        if size >= at_most:
            bounds.append(i + 1)
            size = 0
    return bounds if bounds[-1] == metadata.num_row_groups > 0 else [*bounds, metadata.num_row_groups]


def _read_parquet(piece: FileSlice, path: Path, field: str) -> Iterator[Chunk]:
    file = _import("pyarrow.parquet", path).ParquetFile(path)
    _check_column(file.schema_arrow, path, field)
    groups = range(piece.start, piece.end)
    rows = sum(file.metadata.row_group(i).num_rows for i in groups)
    done = 0
    for batch in file.iter_batches(batch_size=CHUNK_LINES, row_groups=groups, columns=[field]):
        done += batch.num_rows
        yield _chunk_of(batch.column(field), done / rows)


def _read_arrow(piece: FileSlice, path: Path, field: str) -> Iterator[Chunk]:
    """Arrow's file format and its stream format, which the `datasets` library writes."""
    pyarrow = _import("pyarrow", path)
    with pyarrow.OSFile(str(path)) as raw:  # not mapped: what has been read should not count as memory
        if raw.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(raw)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            raw.seek(0)
            reader = batches = pyarrow.ipc.open_stream(raw)
        _check_column(reader.schema, path, field)
        for batch in batches:
            for start in range(0, batch.num_rows, CHUNK_LINES):
                column = batch.column(field).slice(start, CHUNK_LINES)
                yield _chunk_of(column, min(1.0, raw.tell() / piece.size))


def _check_column(schema: Any, path: Path, field: str) -> None:
    if field not in schema.names:
        raise InputError(f"{path}: has no column {field!r}, but {', '.join(schema.names)}; name one with --field")
    kind = schema.field(field).type
    if "string" not in str(getattr(kind, "value_type", kind)):
        raise InputError(f"{path}: the column {field!r} holds no texts, but {kind}")


def _chunk_of(column: Any, done: float) -> Chunk:
    import pyarrow

    # As bytes: a column may hold what is not UTF-8.
    cells = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()
    lines = [Line(None, "holds no text") if cell is None else _line(cell, None) for cell in cells]
    return Chunk(lines, sum(len(cell or b"") for cell in cells), done)


def _import(name: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise InputError(f"{path}: reading it needs the package {package}: pip install 'davae-jax[data]'") from None
