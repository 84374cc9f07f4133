"""Writes files so that they appear complete or not at all, and hashes them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from davae_jax.utils.errors import InputError

# How texts are written that may contain names of files. A byte of a name that is not UTF-8 is a lone surrogate in
# Python; it is written as \udcXX, which in JSON is the escape that `json.loads` turns back into it.
TEXT_ENCODING = {"encoding": "utf-8", "errors": "backslashreplace"}


@contextlib.contextmanager
def naming_file(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Adds the file's name to an OSError that lacks it, as one of a write to a full disk does.

    temporary: a file whose name is replaced too, because users do not know it.
    """
    try:
        yield
    except OSError as e:
        if e.filename not in (None, temporary and str(temporary)):
            raise
        raise OSError(e.errno or errno.EIO, e.strerror or str(e), str(path)) from e  # NumPy's have a message only


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yields a new folder for temporary files that is removed at the end.

    Raises:
      InputError: files cannot be written there; the message names TMPDIR.
    """
    parent = None
    try:
        parent = tempfile.gettempdir()
        with tempfile.TemporaryDirectory(prefix=prefix) as name:
            yield Path(name)
    except OSError as e:
        if e.filename is not None and not (parent and Path(os.fsdecode(e.filename)).is_relative_to(parent)):
            raise
        raise InputError(f"TMPDIR {parent or ''}: temporary files cannot be written ({e.strerror or e})") from e


def user_cache_folder() -> Path:
    """Returns the user's folder for what can be computed anew: davae-jax in XDG_CACHE_HOME or ~/.cache.

    Raises:
      FileNotFoundError: the user has no home folder.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        caches = caches if caches.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "there is no home folder") from None
    return caches / "davae-jax"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary file in the folder of `path`, which replaces `path` at the end of the `with` block.

    If the block raises, the temporary file is removed and `path` is unchanged.
    """
    # Not made from the name itself, which may be as long as the file system permits.
    file = path.with_name(f".{crc32(os.fsencode(path.name)):08x}.{os.getpid()}.partial")
    try:
        with naming_file(path, file):
            yield file
            file.replace(path)
    finally:
        file.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file as `atomic_write` does."""
    with atomic_write(path) as file:
        file.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text as `atomic_write` does."""
    with atomic_write(path) as file:
        file.write_text(text, **TEXT_ENCODING)


def write_json(path: Path, values: Any) -> None:
    """Writes values as indented JSON, as `atomic_write` does."""
    write_text(path, to_json(values))


def check_output(path: Path, option: str = "--output", *, inputs: Iterable[Path] = ()) -> None:
    """Checks that a file that the user names can be written, so that an error comes before the work.

    Args:
      inputs: files that the command reads, which may be missing; a result must not replace one of them.

    Raises:
      InputError: the file cannot be written, or is one of the inputs.
    """
    try:
        if path.is_file() and any(file.is_file() and path.samefile(file) for file in inputs):
            raise InputError(f"{path}: is read by this command; choose another file for {option}", exit_code=2)
        folder = path.resolve().parent
        in_place = path.exists() and (not path.is_file() or not os.access(folder, os.W_OK))
        if path.is_dir():
            raise InputError(f"{path}: is a folder; {option} needs a file")
        if not folder.is_dir():
            raise InputError(f"{path}: cannot be written ({folder} does not exist)")
        if not os.access(path if in_place else folder, os.W_OK):
            raise InputError(f"{path}: cannot be written (Permission denied)")
    except (OSError, RuntimeError) as e:  # a name that is too long; a loop of links, in Python 3.11 and 3.12
        raise InputError(f"{path}: cannot be written ({getattr(e, 'strerror', None) or e})") from None


def is_same_folder(a: Path, b: Path) -> bool:
    """Returns whether two paths lead to one existing folder."""
    try:
        return a.is_dir() and a.samefile(b)
    except OSError:
        return False


def check_local(folder: Path) -> None:
    """Raises InputError if the path of a new folder is not one of this machine, such as an address of a bucket.

    The path of "s3://bucket/run" is s3:/bucket/run, a folder in the working folder, and that of "--run-dir=~/run",
    which no shell expands, is in a folder called "~". Where the user has such a folder, it is meant.
    """
    first = folder.parts[0] if folder.parts else ""
    is_address = len(folder.parts) > 1 and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", first)
    if not (is_address or first == "~") or os.path.lexists(first):
        return
    if is_address:
        raise InputError(f"{folder}: is an address, and results are written to folders only; choose a folder")
    raise InputError(f"{folder}: begins with ~, which the shell has not replaced; write it in full, or use $HOME")


def resolve(path: Path) -> Path:
    """Returns the absolute path with all links followed; it need not exist. Raises InputError if links form a loop."""
    try:
        path.stat()
    except OSError as e:  # `Path.resolve` raises an error for a loop in some versions of Python only
        if e.errno == errno.ELOOP:
            raise InputError(f"{path}: {e.strerror}") from None
    return path.resolve()


def check_utf8_path(path: Path) -> None:
    """Raises InputError if a path is not UTF-8: libraries in C++ that open files by their names cannot take it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{path}: the name is not UTF-8; rename the file or folder") from None


def write_output(path: Path, text: str) -> None:
    """Writes a file that the user names, so that it appears complete or not at all.

    A link is followed. A file that is replaced keeps its permissions: others must not read what they could not read
    before. A pipe, a device, or the file that standard output goes to is written to and not replaced, and so is a file
    that cannot be replaced: its folder is read-only, or the file alone is mounted into a container.

    Raises:
      InputError: it cannot be written.
    """
    try:
        if path.exists() and _is_standard_output(path):
            sys.stdout.write(text)
            sys.stdout.flush()
        elif path.exists() and not path.is_file():
            path.write_text(text, **TEXT_ENCODING)
        else:
            _write_or_replace(path.resolve(), text)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror})") from e


def _write_or_replace(path: Path, text: str) -> None:
    try:
        with _replacement(path) as file:
            file.write_text(text, **TEXT_ENCODING)
    except OSError as e:
        if e.errno not in (errno.EBUSY, errno.EACCES, errno.EROFS) or not os.access(path, os.W_OK):
            raise
        path.write_text(text, **TEXT_ENCODING)


@contextlib.contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """Yields a temporary file that replaces a file at the end of the block, with the permissions of that."""
    with atomic_write(path) as file:
        if path.exists():
            file.touch(mode=0o600)
        yield file
        if path.exists():
            shutil.copymode(path, file)


@contextlib.contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """Yields a temporary file that replaces, at the end of the block, a file that the user names.

    A link is followed, and a file that is replaced keeps its permissions, as of `write_output`.

    Raises:
      InputError: it cannot be written.
    """
    path = path.resolve()
    try:
        with _replacement(path) as file:
            yield file
    except OSError as e:
        if e.filename not in (None, str(path)):
            raise
        raise InputError(f"{path}: cannot be written ({e.strerror})") from e


def _is_standard_output(path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # a stream without a file
        return False


def to_json(values: Any) -> str:
    """Returns values as indented JSON that ends with a line feed."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def is_partial(path: Path) -> bool:
    """Returns whether a file is a temporary one of `atomic_write`, which a killed program does not remove."""
    return re.fullmatch(r"\..+\.\d+\.partial", path.name) is not None


def remove_partial(folder: Path) -> None:
    """Removes the temporary files that killed programs have left in a folder, if it exists."""
    for path in filter(is_partial, folder.iterdir() if folder.is_dir() else ()):
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder, so that after a kill it is there with all its files, or not there under its name.

    Raises OSError if it cannot be renamed.
    """
    hidden = folder.with_name(f".{crc32(os.fsencode(folder.name)):08x}.removed-{secrets.token_hex(4)}")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_removed(parent: Path) -> None:
    """Removes what killed programs have left of folders that `remove_folder` was removing, if the parent exists."""
    for path in parent.iterdir() if parent.is_dir() else ():
        if is_removed(path):
            shutil.rmtree(path, ignore_errors=True)


def is_removed(path: Path) -> bool:
    """Returns whether a folder is one that `remove_folder` was removing."""
    return re.fullmatch(r"\.[0-9a-f]{8}\.removed-[0-9a-f]{8}", path.name) is not None


def read_bounded(path: Path, max_bytes: int, *, pipes: bool = False) -> bytes:
    """Returns the content of a file, of which no more than `max_bytes` is read.

    Args:
      pipes: read from a pipe or a device too, and wait for what it brings.

    Raises:
      InputError: the file is larger, or is a pipe or a device.
      OSError: it cannot be read.
    """
    if not pipes:
        _refuse_pipe(path)
    with path.open("rb") as file:
        return read_stream(file, max_bytes, str(path))


def _refuse_pipe(path: Path) -> None:
    """Raises InputError if a path is something that may never end, or never begin, to be read."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: is a pipe or a device, not a file")


def read_stream(file: BinaryIO, max_bytes: int, name: str) -> bytes:
    """Returns the rest of a stream.

    Raises InputError, which begins with its name, if that is more than `max_bytes` or cannot be read.
    """
    try:
        data = file.read(max_bytes + 1)
    except OSError as e:
        raise InputError(f"{name}: cannot be read ({e.strerror})") from e
    if len(data) > max_bytes:
        raise InputError(f"{name}: is larger than {max_bytes >> 10:,} KiB")
    return data


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal. Raises InputError if it cannot be read."""
    try:
        _refuse_pipe(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
