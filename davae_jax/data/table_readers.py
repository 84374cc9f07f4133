"""Reads the texts in a column of Parquet and Arrow files.

Only a batch of rows (of Parquet, a row group) is in memory at a time, independently of the size of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from davae_jax.data.line_readers import CHUNK_LINES, Chunk, FileSlice, Line, missing_package, parse_line
from davae_jax.utils.errors import InputError


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


def read_parquet(file_slice: FileSlice, field: str) -> Iterator[Chunk]:
    """Yields the texts of a slice, row by row. Raises InputError if there is no string column `field`."""
    path = Path(file_slice.file)
    file = _open_parquet(path)
    _check_column(file.schema_arrow, path, field)
    groups = range(file_slice.start, file_slice.end)
    total_rows = sum(file.metadata.row_group(i).num_rows for i in groups)
    rows_read = 0
    for batch in file.iter_batches(batch_size=CHUNK_LINES, row_groups=groups, columns=[field]):
        rows_read += batch.num_rows
        yield _chunk(batch.column(field), rows_read / total_rows)


def read_arrow(file_slice: FileSlice, field: str) -> Iterator[Chunk]:
    """Yields the texts of an Arrow file, in the file format or in the stream format that the `datasets` library writes.

    Raises InputError if there is no string column `field`.
    """
    path = Path(file_slice.file)
    try:
        import pyarrow
    except ImportError:
        raise missing_package(path, "pyarrow") from None
    with pyarrow.OSFile(str(path)) as raw:  # a memory-mapped file would count as memory of the process
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
                yield _chunk(column, min(1.0, raw.tell() / file_slice.size))


def _open_parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise missing_package(path, "pyarrow") from None
    return ParquetFile(path)


def _check_column(schema: Any, path: Path, field: str) -> None:
    if field not in schema.names:
        raise InputError(
            f"{path}: has no column {field!r}; its columns are {', '.join(schema.names)}; choose one with --field"
        )
    kind = schema.field(field).type
    if "string" not in str(getattr(kind, "value_type", kind)):
        raise InputError(f"{path}: the column {field!r} contains {kind}, not strings")


def _chunk(column: Any, fraction_read: float) -> Chunk:
    import pyarrow

    # As bytes, because a column may contain bytes that are not UTF-8.
    cells = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()
    lines = [Line(None, "contains no text") if cell is None else parse_line(cell, None) for cell in cells]
    return Chunk(lines, sum(len(cell or b"") for cell in cells), fraction_read)
