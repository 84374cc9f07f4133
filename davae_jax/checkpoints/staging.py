"""Writes a folder so that it appears complete or not at all."""

from __future__ import annotations

import contextlib
import filecmp
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from zlib import crc32

from davae_jax.checkpoints.run_folder import CONFIG_FILE, MODEL_FILES, PARAMS_FOLDER, check_path
from davae_jax.checkpoints.sums import foreign_files
from davae_jax.utils.errors import InputError, system_reason
from davae_jax.utils.files import check_local, is_partial, resolve, write_bytes
from davae_jax.utils.locks import FolderLock
from davae_jax.utils.signals import interrupt_at_end


@contextlib.contextmanager
def staged_folder(
    dst: Path, *, overwrite: bool, sources: Sequence[Path] = (), read_back: Callable[[Path], list[str]] | None = None
) -> Iterator[Path]:
    """Yields an empty folder next to `dst` that is renamed to `dst` on success and removed on failure or interrupt.

    With `overwrite`, an older `dst` is removed only after the new folder is complete. Parents that were created for
    `dst` are removed on failure too. The path is absolute, which Orbax needs.

    Args:
      dst: the folder to make.
      overwrite: replace `dst` if it exists.
      sources: folders that must not be inside of `dst`.
      read_back: opens the new folder again before it is renamed, and returns its problems, a line for each.

    Raises:
      InputError: `dst` exists and `overwrite` is off, it contains one of the `sources` or anything but a model, it is
        where a disk is mounted, it cannot be written, or it has problems when it is read back.
    """
    check_local(dst)
    target = resolve(dst)
    # Not made from the name itself, which may be as long as the file system permits. A lock tells whether a folder's
    # program still runs on this machine only, so the name tells the machine.
    prefix = f".{crc32(os.fsencode(target.name)):08x}.{crc32(socket.gethostname().encode()):08x}"
    if target.parent.is_dir():
        _remove_leftovers(target, prefix)
    if target.exists() and not overwrite:
        raise InputError(f"{dst}: exists already; choose another folder, or use --overwrite")
    if target.exists() and not target.is_dir():
        raise InputError(f"{dst}: is a file, not a folder")
    if target.is_dir() and os.path.ismount(target):
        raise InputError(f"{dst}: is a mount point, which cannot be replaced; choose a folder in it")
    check_path(target)
    for source in sources:
        if source.resolve().is_relative_to(target):
            raise InputError(f"{dst}: contains the source {source}; choose another folder", exit_code=2)
    _check_overwritten(dst)
    overwritten = _identity(target)
    tag, is_placed = secrets.token_hex(4), False
    staging, old = target.with_name(f"{prefix}.partial-{tag}"), target.with_name(f"{prefix}.old-{tag}")
    created = [parent for parent in target.parents if not parent.exists()]
    lock, old_lock = FolderLock(), FolderLock()
    try:
        staging.mkdir(parents=True)
        lock.acquire(staging)
        yield staging
        if read_back and (problems := read_back(staging)):
            raise InputError(f"{dst}: is not what was written: {problems[0].replace(str(staging), str(dst))}")
        if _identity(target) != overwritten:
            raise InputError(f"{dst}: was made by another program in the meantime and is left as it is")
        with interrupt_at_end():
            if overwritten:
                old_lock.acquire(target)
                _check_overwritten(dst)  # again: the work may have taken hours
                target.rename(old)
            staging.rename(target)
            is_placed = True
    except InputError:
        raise
    except Exception as e:
        if not (reason := system_reason(e)):
            raise
        file = Path(getattr(e, "filename", None) or staging)
        at_destination = file == target or file.is_relative_to(staging) or staging.is_relative_to(file)
        raise InputError(f"{dst}: cannot be written ({reason})" if at_destination else f"{file}: {reason}") from e
    finally:
        with interrupt_at_end():  # a removal that has begun is completed
            lock.release()
            if not is_placed and old.exists() and not target.exists():  # interrupted between the two renames
                old.rename(target)
            _remove(staging)
            if is_placed:
                _remove_old(old)
            old_lock.release()
            for parent in created:
                with contextlib.suppress(OSError):  # not empty: it contains the result
                    parent.rmdir()


def _check_overwritten(dst: Path) -> None:
    """Raises InputError if a folder contains anything but a model, such as a run's checkpoints or the user's files."""
    names = sorted(path.name for path in dst.iterdir()) if dst.is_dir() else []
    if names and CONFIG_FILE not in names:
        raise InputError(f"{dst}: contains files, but no checkpoint; only a checkpoint can be overwritten")
    own = {name for name in (*MODEL_FILES, PARAMS_FOLDER) if (dst / name).is_dir() == (name == PARAMS_FOLDER)}
    others = [dst / name for name in names if name not in own and not is_partial(Path(name))]
    if others := others + foreign_files(dst / PARAMS_FOLDER):
        raise InputError(f"{others[0]}: would be removed; only a folder of a model alone can be overwritten")
    for folder, _, _ in os.walk(dst.resolve()):
        if not os.access(folder, os.W_OK | os.X_OK):  # it could be renamed, and would stay under a hidden name
            raise InputError(f"{folder}: cannot be removed (Permission denied); choose another folder")


def _identity(path: Path) -> tuple[int, int] | None:
    """Returns what tells a file or folder from another under the same name; None if there is none."""
    try:
        status = path.stat(follow_symlinks=False)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _remove_leftovers(target: Path, prefix: str) -> None:
    """Removes what killed programs have left beside `target`.

    A folder that was to be replaced is put back if the program was killed before the new one was in its place.
    """
    for leftover in [
        path for kind in ("old", "partial", "removed") for path in target.parent.glob(f"{prefix}.{kind}-*")
    ]:
        with contextlib.suppress(OSError, InputError), FolderLock() as lock:
            if not lock.acquire(leftover):  # whether its program still runs is unknown
                continue
            if ".old-" in leftover.name and not target.exists():
                leftover.rename(target)
            elif ".old-" in leftover.name:
                _remove_old(leftover)
            else:
                _remove(leftover)


def _remove_old(old: Path) -> None:
    """Removes a folder that was replaced, under a name by which its remains would not be put back after a kill."""
    with contextlib.suppress(OSError):
        _remove(old.rename(old.with_name(old.name.replace(".old-", ".removed-"))))


def copy_files(names: Sequence[str], source: Path, staging: Path) -> None:
    """Copies the files that the source has, and compares the copies with them.

    Raises InputError if a copy differs.
    """
    for name in names:
        if (source / name).is_file():
            write_bytes(staging / name, (source / name).read_bytes())
            if not filecmp.cmp(source / name, staging / name, shallow=False):
                raise InputError(f"{source / name}: its copy is not the same when it is read back")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # an empty one that cannot be listed, by an unusual umask
            path.rmdir()
    else:
        with contextlib.suppress(OSError):
            path.unlink()
