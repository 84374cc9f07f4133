"""Keeps files open between reads, as many as the operating system permits."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

OTHER_FILES = 256  # that the rest of the program may have open
MIN_OPEN = 16


class _OpenFile:
    def __init__(self):
        self.lock, self.users, self.reader = threading.Lock(), 0, None


class OpenFiles:
    """Readers of numbered files, the least recently used of which are closed. Several threads may use them."""

    def __init__(self, open_reader: Callable[[int], Any], limit: int):
        """Args:
        open_reader: opens the reader of a file, which has a method `close`.
        limit: the number of files that stay open. Files that threads are reading count, but are not closed.
        """
        self._open_reader, self._limit = open_reader, limit
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()  # the most recently used is the last
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def use(self, number: int) -> Iterator[Any]:
        """Yields the reader of a file, which no other thread uses in the meantime."""
        file = self._take(number)
        try:
            with file.lock:
                if file.reader is None:
                    file.reader = self._open_reader(number)
                yield file.reader
        finally:
            with self._lock:
                file.users -= 1

    def _take(self, number: int) -> _OpenFile:
        closing = []
        with self._lock:
            file = self._files.setdefault(number, _OpenFile())
            self._files.move_to_end(number)
            file.users += 1
            if len(self._files) > self._limit:
                idle = [n for n, other in self._files.items() if not other.users]
                closing = [self._files.pop(n) for n in idle[: len(self._files) - self._limit]]
        for other in closing:
            if other.reader is not None:
                other.reader.close()
        return file


def allow_open_files(n: int) -> int:
    """Raises the limit of open files, often 1024, by as much as n files need and the system permits.

    Returns the number of files that may be open, at most n.
    """
    try:
        import resource
    except ImportError:  # on Windows
        return min(n, MIN_OPEN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = max(soft, wanted if hard == resource.RLIM_INFINITY else min(wanted, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return n if soft == resource.RLIM_INFINITY else min(n, max(MIN_OPEN, soft - OTHER_FILES))
