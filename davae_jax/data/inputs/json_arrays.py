"""Reads the objects of a JSON array one after the other: a file of any size, one object of which fits in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

READ_BYTES = 1 << 20
BLANK = re.compile(r"[ \t\n\r]*")
END_OF_NUMBER = re.compile(r"[ \t\n\r,\]}]")
DECODER = json.JSONDecoder()


def begins_array_of_objects(head: bytes) -> bool:
    """Returns whether a file that begins with these bytes is one array of objects, rather than JSON Lines."""
    return re.match(rb"(\xef\xbb\xbf)?[ \t\n\r]*\[[ \t\n\r]*(\{|\])", head) is not None


def iterate_array(file: BinaryIO, max_bytes: int) -> Iterator[Any]:
    """Yields the values of an array. Bytes that are not UTF-8 become lone surrogates.

    Args:
      max_bytes: the largest size of a value.

    Raises:
      ValueError: the file is not one JSON array, or a value is too large; the message gives the number of the value.
    """
    source, number = _Source(file), 0
    separator = source.take()
    if separator != "[":
        raise ValueError("is not a JSON array")
    if source.peek() == "]":
        separator = source.take()
    while separator != "]":
        number += 1
        try:
            yield source.take_value(max_bytes)
        except (ValueError, RecursionError):
            raise ValueError(f"object {number} of the array is not JSON, or is too large") from None
        separator = source.take()
        if separator not in (",", "]"):
            raise ValueError(f"the array ends after object {number} without a bracket")
    if source.peek():
        raise ValueError(f"more follows after the array of {number} objects")


class _Source:
    """The text of a file, of which a part is in memory."""

    def __init__(self, file: BinaryIO):
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text, self._position = "", 0

    def peek(self) -> str:
        """Skips blanks and returns the next character; "" at the end of the file."""
        while True:
            self._position = BLANK.match(self._text, self._position).end()
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read():
                return ""

    def take(self) -> str:
        """Skips blanks and returns and consumes the next character; "" at the end of the file."""
        character = self.peek()
        self._position += len(character)
        return character

    def take_value(self, max_bytes: int) -> Any:
        """Returns and consumes a JSON value. Raises ValueError if there is none, or it is too large."""
        self.peek()
        at_end = False
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._position)
            except ValueError:  # perhaps it continues
                if len(self._text) - self._position > max_bytes or not self._read():
                    raise
                continue
            is_whole = isinstance(value, dict | list | str) or END_OF_NUMBER.match(self._text, end)
            if not is_whole and not at_end and len(self._text) - self._position <= max_bytes:
                at_end = not self._read()  # more digits may follow
                continue
            self._position = end
            return value

    def _read(self) -> bool:
        """Reads on. Returns False at the end of the file.

        What is in memory doubles, so that a long value is not decoded too often.
        """
        data = self._file.read(max(READ_BYTES, len(self._text) - self._position))
        self._text = self._text[self._position :] + self._decoder.decode(data, final=not data)
        self._position = 0
        return bool(data)
