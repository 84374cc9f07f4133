"""Standard output and error of a program whose caller has closed them, or stops reading them."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

from davae_jax.utils.files import TEXT_ENCODING


class WithoutReader:
    """A text stream that discards what is written after its reader has gone, or after another error.

    Attributes:
      error: the error, unless it means that there is no reader.
    """

    def __init__(self, stream: Any):
        self._stream, self.error = stream, None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as e:
            self._discard(e)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as e:
            self._discard(e)

    def _discard(self, error: OSError) -> None:
        """Redirects the stream to nowhere, what it has buffered included."""
        if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal is gone
            self.error = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def going_on_without_reader() -> Iterator[None]:
    """Lets work be completed when the reader of the program's output goes, as in `train.py | head`.

    Raises:
      OSError: standard output could not be written for another reason, such as a full disk; at the end of the work.
    """
    out, err = WithoutReader(sys.stdout), WithoutReader(sys.stderr)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        out.flush()
        err.flush()
    if out.error:
        raise OSError(out.error.errno, out.error.strerror, "standard output")


def open_closed_streams() -> None:
    """Opens standard output and error anew if the caller has closed them, so that no other file gets their number."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w", **TEXT_ENCODING, closefd=False))  # noqa: SIM115


def stdout_is_broken() -> bool:
    """Returns whether standard output accepts nothing. If so, discards the buffered output: Python would try again."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
