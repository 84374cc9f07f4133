"""Reads the texts in a column of Parquet and Arrow files.

Only a batch of rows (of Parquet, a row group) is in memory at a time, independently of the size of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from davae_jax.data.inputs.arrow_sizes import packed_batches
from davae_jax.data.inputs.line_readers import (
    CHUNK_LINES,
    Chunk,
    FileSlice,
    Line,
    gather_chunks,
    missing_package,
    parse_line,
)
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import check_utf8_path

DECODED_BYTES = 1 << 28  # that the cells of the rows decoded at once may have, if they are all as long as the longest
PACKED_TIMES = 100  # compression makes texts three to ten times smaller; what it makes so much smaller is no text


def parquet_slice_bounds(path: Path, max_bytes: int) -> list[int]:
    """Returns the row groups at which slices begin, followed by the number of row groups.

    A slice ends with the row group that brings it to `max_bytes`.
    """
    metadata = _open_parquet(path).metadata
    bounds, size = [0], 0
    for i in range(metadata.num_row_groups):
        size += metadata.row_group(i).total_byte_size
        if size >= max_bytes:
            bounds.append(i + 1)
            size = 0
    return bounds if bounds[-1] == metadata.num_row_groups > 0 else [*bounds, metadata.num_row_groups]


def read_parquet(file_slice: FileSlice, fields: Sequence[str]) -> Iterator[Chunk]:
    """Yields the texts of a slice, row by row. Raises InputError if one of the columns is missing or has no strings."""
    path = Path(file_slice.file)
    file = _open_parquet(path)
    _check_columns(file.schema_arrow, path, fields)
    groups = range(file_slice.start, file_slice.end)
    chunks = _column_chunks(file.metadata, groups, fields)
    for chunk in chunks:
        _check_unpacked(path, chunk.total_compressed_size, chunk.total_uncompressed_size)
    longest = max((chunk.total_uncompressed_size for chunk in chunks), default=0)  # which no cell exceeds
    total_rows, rows_read = sum(file.metadata.row_group(i).num_rows for i in groups), 0

    def lines() -> Iterator[tuple[Line, int]]:
        nonlocal rows_read
        for batch in file.iter_batches(batch_size=_rows_at_once(longest), row_groups=groups, columns=[*fields]):
            rows_read += batch.num_rows
            yield from _lines([batch.column(field) for field in fields])

    return gather_chunks(lines(), lambda: rows_read / total_rows)


def _column_chunks(metadata: Any, groups: Sequence[int], fields: Sequence[str]) -> list[Any]:
    """Returns what the file says of each of these columns in each of these row groups."""
    numbers = [n for n in range(metadata.num_columns) if metadata.schema.column(n).path in fields]
    return [metadata.row_group(i).column(n) for i in groups for n in numbers]


def _check_unpacked(path: Path, packed: int, unpacked: int) -> None:
    """Raises InputError if so few bytes become so many that they are no texts: Arrow unpacks all of them at once."""
    if unpacked > DECODED_BYTES and unpacked > PACKED_TIMES * packed:
        raise InputError(
            f"{path}: {packed:,} bytes of it unpack to {unpacked:,}; more than {PACKED_TIMES} times is no text"
        )


def _rows_at_once(longest: int) -> int:
    """Returns how many rows are decoded at once, given the bytes of the longest cell.

    A dictionary in a file of a few hundred bytes can give every row the same cell of megabytes.
    """
    return max(1, min(CHUNK_LINES, DECODED_BYTES // max(1, longest)))


def read_arrow(file_slice: FileSlice, fields: Sequence[str]) -> Iterator[Chunk]:
    """Yields the texts of an Arrow file, in the file format or in the stream format that the `datasets` library writes.

    Raises InputError if one of the columns is missing or has no strings.
    """
    path = Path(file_slice.file)
    try:
        import pyarrow
    except ImportError:
        raise missing_package(path, "pyarrow") from None
    check_utf8_path(path)
    with open(path, "rb") as file:
        for packed, unpacked in packed_batches(file):
            _check_unpacked(path, packed, unpacked)
    with pyarrow.OSFile(str(path)) as raw:  # a memory-mapped file would count as memory of the process
        if raw.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(raw)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            raw.seek(0)
            reader = batches = pyarrow.ipc.open_stream(raw)
        _check_columns(reader.schema, path, fields)
        yield from gather_chunks(
            (line for batch in batches for line in _lines_of_batch(batch, fields)),
            lambda: min(1.0, raw.tell() / file_slice.size),
        )


def _lines_of_batch(batch: Any, fields: Sequence[str]) -> Iterator[tuple[Line, int]]:
    batch.validate(full=True)  # Arrow trusts offsets; those of a damaged file may point outside of the memory
    columns = [batch.column(field) for field in fields]
    rows = _rows_at_once(max(map(_longest, columns)))
    for start in range(0, len(columns[0]), rows):
        yield from _lines([column.slice(start, rows) for column in columns])


def _open_parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise missing_package(path, "pyarrow") from None
    check_utf8_path(path)
    return ParquetFile(path)


def _check_columns(schema: Any, path: Path, fields: Sequence[str]) -> None:
    import pyarrow

    types = pyarrow.types
    for field in fields:
        if schema.names.count(field) != 1:
            number = "several columns" if field in schema.names else "no column"
            raise InputError(
                f"{path}: has {number} {field!r}; its columns are {', '.join(schema.names)}; choose one with --field"
            )
        kind = schema.field(field).type
        values = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(values) or types.is_large_string(values) or types.is_string_view(values)):
            raise InputError(f"{path}: the column {field!r} contains {kind}, not strings")


def _lines(columns: Sequence[Any]) -> Iterator[tuple[Line, int]]:
    """Yields the line of each row and the bytes of its cells."""
    import pyarrow

    cells = [_plain_strings(column).cast(pyarrow.large_binary()).to_pylist() for column in columns]
    for row in zip(*cells, strict=True):
        yield _row(row), sum(len(cell or b"") for cell in row)


def _longest(column: Any) -> int:
    """Returns the number of bytes of the longest cell; of a dictionary, of its longest value, in use or not."""
    import pyarrow.compute

    values = column.dictionary if pyarrow.types.is_dictionary(column.type) else column
    if pyarrow.types.is_string_view(values.type):  # whose views, of 16 bytes, begin with their lengths
        views = np.frombuffer(values.buffers()[1] or b"", np.int32)[::4][values.offset :][: len(values)]
        return max(0, int(views.max(initial=0)))
    return pyarrow.compute.max(pyarrow.compute.binary_length(values)).as_py() or 0


def _plain_strings(column: Any) -> Any:
    """Returns a column of any type of strings as one of large strings, which can be read as bytes.

    The bytes of a column may not be UTF-8, which its other types find out in different ways.
    """
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):  # not every type of strings can be cast while they are in a dictionary
        column = pyarrow.DictionaryArray.from_arrays(column.indices, column.dictionary.cast(pyarrow.large_string()))
    return column.cast(pyarrow.large_string())


def _row(cells: Sequence[bytes | None]) -> Line:
    """Returns the text of a row: its cells, of several those that are neither null nor blank, joined by line feeds."""
    lines = [parse_line(cell, None) for cell in cells if cell is not None]
    if not lines:
        return Line(None, "contains no text")
    if problems := [line for line in lines if line.problem]:
        return problems[0]
    return lines[0] if len(cells) == 1 else Line("\n".join(line.text for line in lines if line.text.strip()))
