"""Keeps two programs from writing to one folder."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from davae_jax.utils.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


RETRIES, RETRY_SECONDS = 3, 0.1  # so that `is_locked`, which takes a lock for a moment, keeps nobody out


class FolderLock:
    """The operating system's lock of a folder. It ends with the process at the latest, even if that is killed.

        with FolderLock() as lock:
            lock.acquire(folder)
            …

    No file is made. Where a file system has no locks, two programs are not kept apart.
    """

    def __init__(self):
        self._descriptor: int | None = None

    def acquire(self, folder: Path) -> bool:
        """Locks an existing folder. Returns whether it is locked: False if its file system has no locks.

        Raises:
          InputError: another program, or another lock, has locked it.
        """
        if fcntl is None:
            return False
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            for retries_left in reversed(range(RETRIES)):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not retries_left:
                        raise
                    time.sleep(RETRY_SECONDS)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(f"{folder}: another program is writing to this folder") from None
        except OSError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def holds(self, folder: Path) -> bool:
        """Returns whether a path still leads to the locked folder, which may be moved or removed. True without lock."""
        try:
            return self._descriptor is None or os.path.samestat(os.fstat(self._descriptor), os.stat(folder))
        except OSError:
            return False

    def release(self) -> None:
        """Unlocks the folder, if it is locked."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.release()


def is_locked(folder: Path) -> bool:
    """Returns whether another program, or another lock, has locked a folder. Writes nothing and keeps nobody out."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False
