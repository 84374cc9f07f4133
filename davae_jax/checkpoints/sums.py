"""Sums that show whether weights on a disk are what was written.

Two kinds are needed. The sum of an array's values is computed before the array is written, on the devices that hold it,
and does not depend on its sharding. A run's checkpoints carry these sums alone: their files are written by several
processes while training continues, and are not read back. Converted parameters are written once and read often, into
any dtype. They carry the sums of the values too, with which they are read back after writing, and the CRC-32 of every
file, which is checked before Orbax reads the files: it does not depend on the dtype, and names the damaged file. Every
process of several checks all files, because each array is stored whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from davae_jax.checkpoints.run_folder import CHECKPOINT_METADATA
from davae_jax.utils.errors import InputError, system_reason
from davae_jax.utils.files import is_partial, write_json
from davae_jax.utils.json_files import has_right_sum, read_json_object, with_sum

SUMS_FILE = "sums.json"  # in the folder of the parameters: {"arrays": …, "files": …, "sum": …}
ORBAX_METADATA = (CHECKPOINT_METADATA, "_METADATA")  # one of which is in every version's folder
BLOCK = 1 << 20  # bytes that are read at a time


@jax.jit
def array_sums(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns each array's sum of its values' bits, modulo 2³², which does not depend on the sharding."""

    def bits(x):
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(bits, dict(arrays))


def array_sum(array: np.ndarray) -> int:
    """Returns what `array_sums` computes, of one array in memory. 8 bytes count as two values of 4."""
    flat = np.ascontiguousarray(array).reshape(-1)
    unsigned = {1: np.uint8, 2: np.uint16}.get(flat.dtype.itemsize, np.uint32)
    return int(flat.view(unsigned).sum(dtype=np.uint32))


def write_sums(folder: Path, arrays: Mapping[str, int]) -> None:
    """Writes the sums of a folder's arrays, and those of all its files, to SUMS_FILE."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with _threads() as threads:
        files = dict(zip(names, threads.map(lambda name: _size_and_sum(folder / name), names), strict=True))
    write_json(folder / SUMS_FILE, with_sum({"arrays": dict(arrays), "files": files}))


def read_sums(folder: Path) -> dict[str, Any] | None:
    """Returns the content of SUMS_FILE, or None if a version without sums wrote the folder.

    Raises InputError if the file is damaged.
    """
    path = folder / SUMS_FILE
    if not path.exists():
        return None
    values = read_json_object(path)
    if not has_right_sum(values):
        raise InputError(f"{path}: is damaged (its own sum differs)")
    files, arrays = values.get("files"), values.get("arrays")
    is_intact = isinstance(files, dict) and isinstance(arrays, dict)
    if not is_intact or not all(_is_inside(name) and _is_entry(entry) for name, entry in files.items()):
        raise InputError(f"{path}: is damaged")
    return values


def foreign_files(folder: Path) -> list[Path]:
    """Returns the files in a folder of parameters that were not written with them.

    Without sums, or if they are damaged, a folder that contains Orbax's metadata is taken for parameters alone.
    """
    try:
        sums = read_sums(folder)
    except (InputError, OSError):
        sums = None
    if sums is None and any((folder / name).exists() for name in ORBAX_METADATA):
        return []
    listed = {SUMS_FILE, *sums["files"]} if sums else set()
    files = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path for path in files if path.relative_to(folder).as_posix() not in listed and not is_partial(path)]


def file_problems(folder: Path) -> list[str]:
    """Returns one line for each file of a folder that is missing or not what was written; [] without sums."""
    try:
        sums = read_sums(folder)
    except InputError as e:
        return [str(e)]
    with _threads() as threads:
        problems = threads.map(partial(_file_problem, folder), *zip(*sums["files"].items())) if sums else []
        return [problem for problem in problems if problem]


def check_files(folder: Path) -> None:
    """Raises InputError if files of a folder with sums are not what was written; the message names each of them."""
    if problems := file_problems(folder):
        raise InputError("; ".join(problems))


def _file_problem(folder: Path, name: str, expected: list[int]) -> str | None:
    path = folder / name
    size, checksum = expected
    try:
        if not path.is_file():
            return f"{path}: is missing"
        if (actual := path.stat().st_size) != size:
            return f"{path}: has {actual} bytes, but had {size} when it was written"
        if _size_and_sum(path)[1] != checksum:
            return f"{path}: is damaged (its CRC-32 differs)"
    except OSError as e:
        return f"{path}: cannot be read ({system_reason(e)})"
    return None


def _size_and_sum(path: Path) -> list[int]:
    """Returns the size and the CRC-32 of a file."""
    size = checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            size, checksum = size + len(block), crc32(block, checksum)
    return [size, checksum]


def _threads() -> ThreadPoolExecutor:
    """Returns threads that sum several files at the same time: `crc32` lets others run while it computes."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(type(n) is int and n >= 0 for n in entry)
