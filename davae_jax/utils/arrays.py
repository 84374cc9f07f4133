"""Reads .npy files that may be damaged."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from davae_jax.utils.errors import InputError, first_line, system_reason


def read_array_header(path: Path, dimensions: int) -> tuple[tuple[int, ...], np.dtype, int]:
    """Returns the shape of an array of integers, its dtype and the byte at which its values begin.

    Raises:
      InputError: the file cannot be read, or is not what its header says. Nothing of that size has been allocated.
    """
    try:
        with path.open("rb") as file:
            if (version := np.lib.format.read_magic(file)) != (1, 0):
                raise ValueError(f"is in version {version[0]}.{version[1]} of the format, not 1.0")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            begin = file.tell()
        size = path.stat().st_size
    except Exception as e:  # NumPy evaluates the header as Python, which raises many types of errors
        raise InputError(f"{path}: cannot be read ({system_reason(e) or first_line(e)})") from None
    if len(shape) != dimensions or dtype.kind not in "iu" or fortran_order:
        raise InputError(f"{path}: is damaged; copy or prepare it again")
    if min(shape) < 0 or begin + math.prod(shape) * dtype.itemsize != size:
        raise InputError(f"{path}: does not have the size that its header gives; copy or prepare it again")
    return shape, dtype, begin


def read_array(path: Path, dimensions: int, *, mapped: bool = False) -> np.ndarray:
    """Returns an array of integers; `mapped`: it is read from the disk when it is used.

    Raises as `read_array_header`.
    """
    read_array_header(path, dimensions)
    return np.load(path, mmap_mode="r" if mapped else None)
