"""The sizes of the batches of an Arrow file, in bytes of the file and in bytes of memory, read without the batches.

Arrow unpacks a batch as a whole, so that a file of a few kilobytes could fill the memory before its rows are seen. The
layout is that of Arrow's columnar format (https://arrow.apache.org/docs/format/Columnar.html): messages, whose headers
are FlatBuffers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

FILE_MAGIC = b"ARROW1\0\0"
CONTINUATION = 0xFFFFFFFF
HEADER_TYPE, HEADER, BODY_LENGTH = 1, 2, 3  # the fields of a message
DICTIONARY_BATCH, RECORD_BATCH = 2, 3  # types of headers
DATA = 1  # of a dictionary batch: its record batch
BUFFERS, COMPRESSION = 2, 3  # of a record batch
LARGEST_HEADER = 1 << 24


def packed_batches(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Yields, for each compressed batch, the bytes it takes in the file and the bytes it takes in memory.

    Of a damaged file, those before the damage: what is wrong is for Arrow to say, which reads the headers again.
    """
    position = len(FILE_MAGIC) if file.read(len(FILE_MAGIC)) == FILE_MAGIC else 0
    try:
        while True:
            file.seek(position)
            (length,) = struct.unpack("<I", file.read(4))
            position += 4
            if length == CONTINUATION:  # old files have none
                (length,) = struct.unpack("<I", file.read(4))
                position += 4
            if not 0 < length <= LARGEST_HEADER:  # 0 ends the messages
                return
            header = file.read(length)
            position += length
            place = _field(header, _root(header), BODY_LENGTH)
            body = struct.unpack_from("<q", header, place)[0] if place else 0
            if body < 0:
                return
            buffers = [(position + start, size) for start, size in _compressed_buffers(header)]
            if buffers:
                yield body, sum(_unpacked_size(file, *buffer) for buffer in buffers)
            position += body
    except (struct.error, IndexError, TypeError):  # cut off, an offset outside of the header, a field that is missing
        return


def _compressed_buffers(header: bytes) -> list[tuple[int, int]]:
    """Returns where in the message's body its buffers begin, and their sizes; none if it has no compressed ones."""
    message = _root(header)
    kind = header[_field(header, message, HEADER_TYPE)]
    if kind not in (DICTIONARY_BATCH, RECORD_BATCH):
        return []
    batch = _follow(header, _field(header, message, HEADER))
    if kind == DICTIONARY_BATCH:
        batch = _follow(header, _field(header, batch, DATA))
    if _field(header, batch, COMPRESSION) is None:
        return []
    vector = _follow(header, _field(header, batch, BUFFERS))
    (count,) = struct.unpack_from("<I", header, vector)
    return list(struct.iter_unpack("<qq", header[vector + 4 : vector + 4 + 16 * min(count, len(header))]))


def _unpacked_size(file: IO[bytes], start: int, size: int) -> int:
    """Returns the size that a compressed buffer says it has in memory; -1 in its place means that it is as it is."""
    if size < 8 or start < 0:
        return 0
    file.seek(start)
    (unpacked,) = struct.unpack("<q", file.read(8))
    return max(unpacked, 0)


def _root(table: bytes) -> int:
    return _follow(table, 0)


def _follow(table: bytes, position: int) -> int:
    return position + struct.unpack_from("<I", table, position)[0]


def _field(table: bytes, position: int, number: int) -> int | None:
    """Returns where a field of the FlatBuffers table at a position begins; None if it has its default."""
    vtable = position - struct.unpack_from("<i", table, position)[0]
    (size,) = struct.unpack_from("<H", table, vtable)
    entry = 4 + 2 * number
    offset = struct.unpack_from("<H", table, vtable + entry)[0] if entry < size else 0
    return position + offset if offset else None
