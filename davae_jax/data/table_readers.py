"""Reads the texts in a column of Parquet and Arrow files.

Only a batch of rows (of Parquet, a row group) is in memory at a time, independently of the size of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from davae_jax.data.line_readers import CHUNK_LINES, Chunk, FileSlice, Line, missing_package, parse_line
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import check_utf8_path


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
    total_rows = sum(file.metadata.row_group(i).num_rows for i in groups)
    rows_read = 0
    for batch in file.iter_batches(batch_size=CHUNK_LINES, row_groups=groups, columns=[*fields]):
        rows_read += batch.num_rows
        yield _chunk([batch.column(field) for field in fields], rows_read / total_rows)


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
    with pyarrow.OSFile(str(path)) as raw:  # a memory-mapped file would count as memory of the process
        if raw.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(raw)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            raw.seek(0)
            reader = batches = pyarrow.ipc.open_stream(raw)
        _check_columns(reader.schema, path, fields)
        for batch in batches:
            batch.validate(full=True)  # Arrow trusts offsets; those of a damaged file may point outside of the memory
            for start in range(0, batch.num_rows, CHUNK_LINES):
                columns = [batch.column(field).slice(start, CHUNK_LINES) for field in fields]
                yield _chunk(columns, min(1.0, raw.tell() / file_slice.size))


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


def _chunk(columns: Sequence[Any], fraction_read: float) -> Chunk:
    import pyarrow

    cells = [_plain_strings(column).cast(pyarrow.large_binary()).to_pylist() for column in columns]
    rows = list(zip(*cells))
    lines = [_row(row) for row in rows]
    return Chunk(lines, sum(len(cell or b"") for row in rows for cell in row), fraction_read)


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
    texts = [cell for cell in cells if cell is not None]
    if not texts:
        return Line(None, "contains no text")
    return parse_line(texts[0] if len(cells) == 1 else b"\n".join(text for text in texts if text.strip()), None)
