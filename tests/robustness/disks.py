"""File systems of a case's own: a small disk, and folders that cannot be written, in a private mount namespace.

Root writes into read-only folders, so their mode would not do. Where a namespace cannot be had, the cases are not run.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 4096, 16384, 1 << 18


class NotPermitted(Exception):
    """This user may not mount."""


def enter_private_namespace() -> None:
    """Gives this process mounts of its own, which end with it. Raises NotPermitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise NotPermitted(f"unshare: {os.strerror(ctypes.get_errno())}")
    _mount("none", "/", None, MS_REC | MS_PRIVATE)


def mount_small_disk(folder: Path, size: int) -> None:
    """Mounts an empty file system of some bytes."""
    _mount("tmpfs", str(folder), "tmpfs", 0, f"size={size}")


def enlarge(folder: Path, size: int) -> None:
    """Makes room on a file system of `mount_small_disk`."""
    _mount("tmpfs", str(folder), "tmpfs", MS_REMOUNT, f"size={size}")


def make_read_only(folder: Path) -> None:
    """Makes a folder read-only for this process and those that it starts, root included."""
    _mount(str(folder), str(folder), None, MS_BIND | MS_REC)
    _mount("none", str(folder), None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    encode = lambda text: None if text is None else os.fsencode(text)  # noqa: E731
    if libc.mount(encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(options)):
        raise NotPermitted(f"mount {target}: {os.strerror(ctypes.get_errno())}")
