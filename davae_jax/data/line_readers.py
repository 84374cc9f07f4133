"""Reads plain text and JSON Lines, also compressed."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from davae_jax.data.texts import parse_json_text
from davae_jax.utils.errors import InputError

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


def _import(name: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise InputError(f"{path}: reading it needs the package {package}: pip install 'davae-jax[data]'") from None
