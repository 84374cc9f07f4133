"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from davae_jax.errors import InputError


@contextlib.contextmanager
def staged(dst: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder beside `dst`; renamed to `dst` on success, removed on any failure or interrupt.

    With `overwrite`, what stood at `dst` goes only once the new folder is complete.

    Raises:
      InputError: `dst` exists and `overwrite` is off, or the folder cannot be made.
    """
    if dst.exists() and not overwrite:
        raise InputError(f"{dst}: exists already; give another folder, or --overwrite")
    staging = dst.parent / f".{dst.name}.partial-{os.getpid()}"
    try:
        staging.mkdir(parents=True)
    except OSError as e:
        raise InputError(f"{dst}: cannot be written ({e.strerror})") from e
    try:
        yield staging
        if dst.exists():
            old = dst.parent / f".{dst.name}.old-{os.getpid()}"
            dst.rename(old)
            staging.rename(dst)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            staging.rename(dst)
    except OSError as e:
        raise InputError(f"{dst}: cannot be written ({e.strerror or e})") from e
    finally:
        shutil.rmtree(staging, ignore_errors=True)
