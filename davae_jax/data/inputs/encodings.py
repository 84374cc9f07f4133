"""Reads text in any of Python's text encodings as UTF-8, a part at a time, and recognizes files by their beginnings."""

from __future__ import annotations

import codecs
import contextlib
import io
from typing import BinaryIO

from davae_jax.utils.errors import InputError, OptionError

UTF_8 = "utf-8"
READ_BYTES = 1 << 16
MAX_PENDING_BYTES = 1 << 20  # that a decoder may keep because they do not end; UTF-7 has no bound of its own
# A lone surrogate stands for bytes that cannot be decoded. Encoded, it is not UTF-8 either, and its line is bad.
_BAD_BYTES = "\udc80"

BYTE_ORDER_MARKS = {  # beginning of a file → its encoding; the longer one of two comes first
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x84\x31\x95\x33": "GB18030",
    b"\xef\xbb\xbf": "UTF-8",
}
SIGNS = {  # beginnings of other files that are often given by mistake
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself; get it with git lfs pull",
    b"\x1f\x8b": "compressed with gzip, but its name does not end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard, but its name does not end in .zst",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "Parquet, but its name does not end in .parquet",
    b"ARROW1": "Arrow, but its name does not end in .arrow",
    **{b"BZh%d1AY&SY" % level: "compressed with bzip2; unpack it" for level in range(1, 10)},
    b"\xfd7zXZ\x00": "compressed with xz; unpack it",
    b"\x04\x22\x4d\x18": "compressed with lz4; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!\x1a\x07": "a rar archive; unpack it",
    b"%PDF-": "a PDF; convert it to text",
}
TAR_SIGN, TAR_OFFSET = b"ustar", 257  # the names of its files, and zeros, would be texts
HEAD_BYTES = 512  # of a file that `check_head` needs


def _mark_bad_bytes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _BAD_BYTES, error.end


_ERRORS = "davae_jax.mark_bad_bytes"
codecs.register_error(_ERRORS, _mark_bad_bytes)


def check_encoding(name: str, option: str = "--encoding") -> str:
    """Returns Python's name of a text encoding.

    Raises:
      OptionError: there is no such encoding, or it is a codec that does not encode lines of text, such as hex, idna or
        unicode_escape.
    """
    probe = "a\\u0041 b" * 20 + "\n"
    try:
        encoding = codecs.lookup(name).name
        data = probe.encode(name)
        decoder = codecs.getincrementaldecoder(name)(_ERRORS)
        decoded = "".join(decoder.decode(data[i : i + 1]) for i in range(len(data))) + decoder.decode(b"", final=True)
        decoder.getstate()
    except (LookupError, ValueError, AttributeError, NotImplementedError):
        decoded = None
    if decoded != probe or b"\\u0041".decode(name, "replace") == "A":
        raise OptionError(option, f"{name}: is not the name of a text encoding, such as gb18030, big5 or utf-16")
    return UTF_8 if encoding == "utf-8-sig" else encoding


def recode(file: BinaryIO, encoding: str) -> BinaryIO:
    """Returns a stream of the file's text in UTF-8. Bytes that cannot be decoded become bytes that are not UTF-8."""
    return file if encoding == UTF_8 else io.BufferedReader(_Recoded(file, encoding), READ_BYTES)


def recode_bytes(data: bytes, encoding: str) -> bytes:
    """Returns text in UTF-8, as `recode` does. Raises ValueError if it cannot be decoded at all."""
    with recode(io.BytesIO(data), encoding) as stream:
        return stream.read()


class _Recoded(io.RawIOBase):
    """The text of a file in UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str):
        self._file, self._encoding = file, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)(_ERRORS)
        self._recoded, self._at_end = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._recoded and not self._at_end:
            data = self._file.read(READ_BYTES)
            self._at_end = not data
            self._recoded = self._decode(data).encode("utf-8", "surrogatepass")
        n = min(len(buffer), len(self._recoded))
        buffer[:n], self._recoded = self._recoded[:n], self._recoded[n:]
        return n

    def _decode(self, data: bytes) -> str:
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeError as e:  # of utf-16 and utf-32, which know their byte order by a mark
            raise ValueError(f"{e}; choose --encoding {self._encoding}-le or {self._encoding}-be") from None
        if len(self._decoder.getstate()[0]) > MAX_PENDING_BYTES:
            raise ValueError(f"is not {self._encoding}")
        return text


def check_head(head: bytes, name: str, encoding: str) -> None:
    """Raises InputError if a file that begins with these bytes is neither text nor JSON in this encoding.

    name: the file, with which the message begins.
    """
    for mark, marked in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            decoded = None
            with contextlib.suppress(UnicodeError):
                decoded = codecs.getincrementaldecoder(encoding)().decode(mark)
            if decoded not in ("", "\ufeff"):
                hint = f"--encoding {marked.lower()} reads it (train.py: --data.encoding)"
                raise InputError(f"{name}: is {marked}, not {encoding.upper()}; {hint}")
            return
    unmarked = _without_mark(head)
    if unmarked and "\0" in head.decode(encoding, "ignore"):
        raise InputError(
            f"{name}: looks like {unmarked.upper()} without a byte-order mark, not {encoding.upper()}; "
            f"--encoding {unmarked} reads it (train.py: --data.encoding)"
        )
    for sign, kind in SIGNS.items():
        if head.startswith(sign):
            raise InputError(f"{name}: is {kind}")
    if head.startswith(TAR_SIGN, TAR_OFFSET):
        raise InputError(f"{name}: is a tar archive; unpack it")


def _without_mark(head: bytes) -> str | None:
    """Returns the encoding of two to four ASCII characters of two or four bytes each; None if it begins otherwise."""
    for encoding, width, place in [("utf-32-le", 4, 0), ("utf-32-be", 4, 3), ("utf-16-le", 2, 0), ("utf-16-be", 2, 1)]:
        whole = head[: min(4, len(head) // width) * width]
        others = [whole[i::width] for i in range(width) if i != place]
        if len(whole) >= 2 * width and all(whole[place::width]) and not any(map(any, others)):
            return encoding
    return None
