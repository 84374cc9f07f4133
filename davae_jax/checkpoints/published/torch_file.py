"""Reads and writes PyTorch checkpoints as NumPy arrays: memory-mapped, and without running code of a pickle.

A damaged file is not taken for weights: the CRC-32 of every part of a zip file is checked, and the layout rules of
safetensors, which has no sums (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from davae_jax.checkpoints.published.torch_archive import read_torch
from davae_jax.utils.errors import InputError, first_line
from davae_jax.utils.json_files import read_json_object

TORCH_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference
SAFETENSORS_DTYPES = {
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
INDEX_SUFFIX = ".index.json"  # of the index of a checkpoint in several files
WEIGHTS_FILES = tuple(name + suffix for name in TORCH_FILES for suffix in ("", INDEX_SUFFIX))  # in the same order
# Of safetensors, where a tensor takes about 100; the format permits 100 MB, which take a minute.
MAX_HEADER_BYTES = 1 << 24


def find_weights_file(folder: Path) -> Path:
    """Returns the weights file of a folder: model.safetensors, else pytorch_model.bin. A file is returned as it is.

    Of a checkpoint in several files, it is their index.

    Raises:
      InputError: the folder has none of them.
    """
    if folder.is_file():
        return folder
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder}: contains no {' and no '.join(TORCH_FILES)}")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns every tensor of a checkpoint by name, memory-mapped: a page is read when it is touched.

    Args:
      path: a file that `find_weights_file` returns.

    Raises:
      InputError: the file is damaged, is not a checkpoint, or is a pickle that would run code (which is not run).
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _read_parts(path)
    state = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if unprintable := [name for name in state if not name.isprintable()]:
        raise InputError(f"{path}: contains a tensor with an unprintable name, {unprintable[0]!r}")
    return state


def _read_parts(index: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a checkpoint in several files, which the index assigns to the files."""
    files = read_json_object(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f"{index}: lacks a weight_map from tensors to files")
    state: dict[str, np.ndarray] = {}
    for file in sorted(set(files.values())):
        part = index.parent / file
        if Path(file).name != file or not os.path.isfile(part):  # False too for a name that cannot be one
            raise InputError(f"{index}: names {file!r}, which is not in its folder")
        if file.endswith(INDEX_SUFFIX):
            raise InputError(f"{index}: names {file!r}, which is an index and contains no tensors")
        tensors = read_tensors(part)
        expected = {name for name, other in files.items() if other == file}
        if different := sorted(expected ^ tensors.keys()):
            problem = "lacks" if different[0] in expected else "contains"
            raise InputError(f"{part}: {problem} {different[0]}, against {index.name}")
        state |= tensors
    return state


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    # The format is a length, a JSON header and the data. The safetensors package's NumPy interface reads the whole file
    # into memory and has no bfloat16, so the data are mapped here.
    try:
        with open(path, "rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            data_size = path.stat().st_size - 8 - header_size
            if data_size < 0 or header_size > MAX_HEADER_BYTES:
                raise ValueError("the header is too long")
            header = json.loads(file.read(header_size).decode("utf-8"), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("the header is no object")
        header.pop("__metadata__", None)
        data = np.memmap(path, np.uint8, mode="r", offset=8 + header_size) if data_size else np.zeros(0, np.uint8)
        spans = {name: _span(name, entry) for name, entry in header.items()}
        position = 0
        for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
            if begin != position:
                raise ValueError(f"the data of {name!r} do not begin where those before end")
            position = end
        if position != data_size:
            raise ValueError(f"the tensors take {position} bytes, but there are {data_size}")
        return {
            name: data[slice(*spans[name])].view(SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
        }
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as e:
        reason = f" ({first_line(e)})" if type(e) is ValueError else ""
        raise InputError(f"{path}: cannot be read: it is damaged or not in the safetensors format{reason}") from e


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of a JSON text. Raises ValueError if a name occurs twice."""
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice in the header")
    return values


def _span(name: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the bytes of a tensor, from begin to end.

    Raises:
      InputError: the dtype is not supported.
      ValueError: the entry is not as the format requires.
    """
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise InputError(f"{name!r} has the dtype {entry['dtype']!r}; supported: {', '.join(SAFETENSORS_DTYPES)}")
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (begin, end, *shape)):
        raise ValueError(f"{name!r} has no valid shape or offsets")
    if end - begin != math.prod(shape) * np.dtype(SAFETENSORS_DTYPES[entry["dtype"]]).itemsize:
        raise ValueError(f"the data of {name!r} do not fit its shape")
    return begin, end


def write_bin(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes pytorch_model.bin in torch.save's zip format, as published."""
    try:
        import torch
    except ImportError:
        raise InputError(f"writing {path.name} needs PyTorch: pip install 'davae-jax[torch]'") from None
    torch.save({name: as_torch(array) for name, array in state.items()}, path)


def write_safetensors(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes model.safetensors."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path, metadata={"format": "pt"})


def as_torch(array: np.ndarray):
    """Returns a torch tensor that shares the array's memory if the array is contiguous."""
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def is_finite(array: np.ndarray) -> bool:
    """Returns whether no value is NaN or infinite, of float64 in float32, the largest dtype of a model.

    Works in blocks that stay in the processor's cache.
    """
    flat = array.reshape(-1)
    block = 1 << 18
    with np.errstate(over="ignore"):
        blocks = (flat[i : i + block] for i in range(0, flat.size, block))
        return all(np.isfinite(x.astype(np.float32) if x.dtype == np.float64 else x).all() for x in blocks)


def is_float(array: np.ndarray) -> bool:
    """Returns whether the dtype is floating point, bfloat16 included."""
    return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16
