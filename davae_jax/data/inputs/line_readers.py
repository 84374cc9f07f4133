"""Reads files with one text per line, plain text or JSON Lines, or a JSON array, optionally compressed.

Only a chunk of lines is in memory at a time, independently of the size of the file.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from davae_jax.data.inputs.encodings import HEAD_BYTES, UTF_8, check_head, recode
from davae_jax.data.inputs.json_arrays import begins_array_of_objects, iterate_array
from davae_jax.data.inputs.texts import join_fields, parse_json_text, warn_of_form
from davae_jax.utils.errors import InputError

MAX_LINE_BYTES = 1 << 24  # a longer line is reported as a problem, to limit memory use
MAX_SKIPPED_BYTES = 1 << 34  # of one line; the line of a device such as /dev/zero never ends
CHUNK_LINES, CHUNK_BYTES = 1000, 1 << 20
HEAD_OF_TEXT_BYTES = 1 << 16


class FileSlice(NamedTuple):
    """A contiguous range of an input file, which one worker reads.

    The unit of `start` and `end` depends on the format: bytes for lines (a slice has the lines that begin in it), row
    groups for Parquet. `end` is None for a file that can only be read from its beginning; the slice is then the entire
    file.
    """

    file: str
    start: int
    end: int | None
    size: int  # bytes of the file that the slice covers, for the progress bar
    encoding: str = UTF_8  # of text and JSON


class Line(NamedTuple):
    """The text of a line, or None and a description of the problem."""

    text: str | None
    problem: str | None = None


class Chunk(NamedTuple):
    """Consecutive lines of a slice."""

    lines: list[Line]
    text_bytes: int
    fraction_read: float  # of the slice, from 0 to 1


def read_plain_lines(file_slice: FileSlice, fields: Sequence[str]) -> Iterator[Chunk]:
    """Yields the lines of a slice of plain text; `fields` are not used."""
    return _read_lines(file_slice, None)


def read_json(file_slice: FileSlice, fields: Sequence[str]) -> Iterator[Chunk]:
    """Yields the texts in the fields of each line of a slice of JSON Lines, or of each object of a JSON array."""
    if file_slice.start == 0 and is_json_array(Path(file_slice.file), file_slice.encoding):
        return _read_array(file_slice, fields)
    return _read_lines(file_slice, fields)


def is_json_array(path: Path, encoding: str = UTF_8) -> bool:
    """Returns whether a file of JSON is one array of objects, as WuDao and many others come, and not JSON Lines."""
    if not path.is_file():  # a pipe, which can be read once
        return False
    with path.open("rb") as raw, _decompress(raw, path) as file, recode(file, encoding) as text:
        head = text.read(1 << 16)
    if not begins_array_of_objects(head):
        return False
    first_line, *others = head.split(b"\n", 1)
    names_lines = not any(suffix.lower() == ".json" for suffix in path.suffixes[-2:])
    return not (names_lines and others and _is_json(first_line))  # JSON Lines, of which each line is an array


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def check_beginning(path: Path, encoding: str = UTF_8, *, is_text: bool = False) -> None:
    """Raises InputError if a file begins as one does that is neither text nor JSON in this encoding.

    is_text: the file is plain text; warns if it is probably not one text per line.
    """
    if not path.is_file():  # a pipe, which can be read once
        return
    with path.open("rb") as raw, _decompress(raw, path) as file:
        check_head(file.read(HEAD_BYTES), str(path), encoding)
    if is_text:
        with path.open("rb") as raw, _decompress(raw, path) as file, recode(file, encoding) as text:
            beginning = text.read(HEAD_OF_TEXT_BYTES)
            if b"\r" in beginning and b"\n" not in beginning:  # perhaps one long text with carriage returns
                beginning += text.read(MAX_LINE_BYTES)
        warn_of_form(beginning, str(path))


def _read_array(file_slice: FileSlice, fields: Sequence[str]) -> Iterator[Chunk]:
    def parse_all(file: BinaryIO) -> Iterator[tuple[Line, int]]:
        for values in iterate_array(file, MAX_LINE_BYTES):
            try:
                line = Line(join_fields(values, fields))
            except ValueError as e:
                line = Line(None, str(e))
            yield line, len((line.text or "").encode())

    return _in_chunks(file_slice, parse_all)


def _read_lines(file_slice: FileSlice, fields: Sequence[str] | None) -> Iterator[Chunk]:
    def parse_all(file: BinaryIO) -> Iterator[tuple[Line, int]]:
        at_start_of_file = file_slice.start == 0
        for data in _lines_in(file_slice, file):
            if at_start_of_file and data is not None:
                data = data.removeprefix(b"\xef\xbb\xbf")
            at_start_of_file = False
            yield parse_line(data, fields, file_slice.encoding), len(data or b"")

    return _in_chunks(file_slice, parse_all)


def _in_chunks(file_slice: FileSlice, parse_all: Callable[[BinaryIO], Iterator[tuple[Line, int]]]) -> Iterator[Chunk]:
    """Yields what `parse_all` yields for the slice's decompressed file in UTF-8, lines and their sizes, in chunks."""
    path = Path(file_slice.file)
    with path.open("rb") as raw, _decompress(raw, path) as file, recode(file, file_slice.encoding) as text:
        yield from gather_chunks(parse_all(text), lambda: _fraction_read(raw, file_slice))


def gather_chunks(lines: Iterable[tuple[Line, int]], fraction_read: Callable[[], float]) -> Iterator[Chunk]:
    """Yields lines in chunks, given each with its size and a function that tells how much of the slice is read."""
    chunk, text_bytes = [], 0
    for line, size in lines:
        chunk.append(line)
        text_bytes += size
        if len(chunk) == CHUNK_LINES or text_bytes >= CHUNK_BYTES:
            yield Chunk(chunk, text_bytes, fraction_read())
            chunk, text_bytes = [], 0
    if chunk:
        yield Chunk(chunk, text_bytes, 1.0)


def parse_line(data: bytes | None, fields: Sequence[str] | None, encoding: str = UTF_8) -> Line:
    """Returns the text of one line.

    Args:
      data: the line in UTF-8, without its line feed; None for one that was not read, because it is too long.
      fields: the fields that contain the text, if the line is JSON; None for plain text.
      encoding: the encoding that the line had, for messages.
    """
    if data is None or len(data) > MAX_LINE_BYTES:  # a cell of a table may be of any length
        return Line(None, f"is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Line(None, f"is not {encoding.upper()}")
    if fields is None:
        return Line(text)
    try:
        return Line(parse_json_text(text, fields))
    except ValueError as e:
        return Line(None, str(e))


def _lines_in(file_slice: FileSlice, file: BinaryIO) -> Iterator[bytes | None]:
    """Yields the lines that begin in the slice, without their line ends; None for a line that is too long."""
    position, end = file_slice.start, file_slice.end
    if position:  # a line that begins before the slice belongs to the previous one
        file.seek(position - 1)
        position += _skip_line(file, end - position + 1) - 1
    while end is None or position < end:
        data = file.readline(MAX_LINE_BYTES)
        if not data:
            return
        position += len(data)
        if len(data) == MAX_LINE_BYTES and not data.endswith(b"\n"):
            position += _skip_line(file, None if end is None else end - position)
            yield None
        else:
            yield data.removesuffix(b"\n").removesuffix(b"\r")


def _skip_line(file: BinaryIO, most: int | None) -> int:
    """Reads to the end of the line, but not more than `most` bytes. Returns the number of bytes read.

    Every slice of a file of one long line would otherwise read the rest of the file.

    Raises ValueError if `most` is None and the line does not seem to end.
    """
    skipped, limit = 0, MAX_SKIPPED_BYTES if most is None else most
    while skipped < limit and (data := file.readline(min(MAX_LINE_BYTES, limit - skipped))):
        skipped += len(data)
        if data.endswith(b"\n"):
            return skipped
    if most is None and skipped >= limit:
        raise ValueError(f"a line is longer than {limit >> 30} GiB")
    return skipped


def _fraction_read(raw: BinaryIO, file_slice: FileSlice) -> float:
    if not raw.seekable():  # a pipe
        return 0.0
    end = file_slice.size if file_slice.end is None else file_slice.end
    return min(1.0, (raw.tell() - file_slice.start) / max(1, end - file_slice.start))


# ---- compressed files


def _decompress(raw: BinaryIO, path: Path) -> BinaryIO:
    """Returns the file itself, or a stream of its decompressed bytes if it has the suffix of a compressed format."""
    open_stream = DECOMPRESSORS.get(path.suffix.lower())
    if open_stream is None:
        return raw
    if not raw.peek(1):
        raise EOFError("the file is empty, which no compressed file is")
    return io.BufferedReader(_Unpacked(open_stream(raw), raw), CHUNK_BYTES)


# A text may consist of one line that is repeated. More than this is a bomb: 1 MiB of Zstandard can be 30 GiB of blank
# lines, which take hours.
MAX_RATIO, MIN_UNPACKED_BYTES = 1000, 1 << 26


class _Unpacked(io.RawIOBase):
    """The decompressed bytes of a file. Raises ValueError when they are too many for the bytes that were read."""

    def __init__(self, stream: BinaryIO, raw: BinaryIO):
        self._stream, self._raw, self._size = stream, raw, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        n = self._stream.readinto(buffer)
        self._size += n
        if self._size > MIN_UNPACKED_BYTES and self._raw.seekable() and self._size > MAX_RATIO * self._raw.tell():
            raise ValueError(f"it unpacks to more than {MAX_RATIO:,} times its size; if that is right, unpack it")
        return n


def _open_gzip(raw: BinaryIO) -> BinaryIO:
    return gzip.GzipFile(fileobj=raw)


def _open_zstd(raw: BinaryIO) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise missing_package(raw.name, "zstandard") from None
    return _ZstdStream(raw, zstandard.ZstdDecompressor)


DECOMPRESSORS = {".gz": _open_gzip, ".zst": _open_zstd}


def missing_package(file: Any, package: str) -> InputError:
    """Returns the error for a format that needs a package which is not installed."""
    return InputError(f"{file}: reading it needs the package {package}: pip install 'davae-jax[data]'")


# Four bytes of a malicious file can stand for 128 KiB, and zstandard returns at once all that these bytes stand for.
ZSTD_READ_BYTES = 1 << 9


class _ZstdStream(io.RawIOBase):
    """The decompressed bytes of all frames of a file.

    zstandard's own reader does not detect a truncated file; this one raises EOFError.
    """

    def __init__(self, raw: BinaryIO, new_decompressor: Any):
        self._raw, self._new_decompressor = raw, new_decompressor
        self._frame = new_decompressor().decompressobj()
        self._compressed, self._decompressed, self._inside_frame = b"", memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._decompressed:
            compressed = self._compressed or self._raw.read(ZSTD_READ_BYTES)
            self._compressed, self._decompressed = b"", memoryview(b"")  # an empty view would keep what it is a part of
            if not compressed:
                if self._inside_frame:
                    raise EOFError("the compressed file ends too early")
                return 0
            self._decompressed, self._inside_frame = memoryview(self._frame.decompress(compressed)), True
            if self._frame.eof:
                self._compressed, self._inside_frame = self._frame.unused_data, False
                self._frame = self._new_decompressor().decompressobj()
        n = min(len(buffer), len(self._decompressed))
        buffer[:n], self._decompressed = self._decompressed[:n], self._decompressed[n:]
        return n
