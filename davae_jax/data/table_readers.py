"""Reads a column of Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from davae_jax.data.line_readers import (
    CHUNK_LINES,
    Chunk,
    FileSlice,
    Line,
    _import,
    _line,
)
from davae_jax.utils.errors import InputError


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
