"""Reads and writes PyTorch checkpoints as NumPy arrays: memory-mapped, and without running code of a pickle."""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from davae_jax.utils.errors import InputError

TORCH_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference: safetensors does not need PyTorch
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
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.serialization.MAGIC_NUMBER, pickled


def find_weights_file(folder: Path) -> Path:
    """Returns the weights file of a folder: model.safetensors, else pytorch_model.bin. A file is returned as it is.

    Raises:
      InputError: the folder has neither.
    """
    if folder.is_file():
        return folder
    for name in TORCH_FILES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder}: contains no {' and no '.join(TORCH_FILES)}")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns every tensor of a checkpoint by name, memory-mapped: a page is read when it is touched.

    Raises:
      InputError: the file is truncated, is not a checkpoint, or is a pickle that would run code (which is not run).
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    torch = _torch(f"reading {path.name}")
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols; real problems are raised
            state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as e:
        if requested := re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)", str(e)):
            name = requested[1] or requested[2]
            raise InputError(f"{path}: rejected: the pickle references {name}, which could execute code") from e
        raise InputError(f"{path}: rejected: the pickle is damaged or contains more than tensors") from e
    except Exception as e:  # PyTorch raises RuntimeError, EOFError, OSError and more for damaged files
        raise InputError(f"{path}: cannot be read: {_why_unreadable(path)}") from e
    if not isinstance(state, Mapping):
        raise InputError(f"{path}: contains a {type(state).__name__}, not a dict of tensors")
    if not_tensors := [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise InputError(f"{path}: contains values that are not tensors: {', '.join(not_tensors)}")
    if not_strings := [repr(name) for name in state if not isinstance(name, str)]:
        raise InputError(f"{path}: contains tensors whose names are not strings: {', '.join(not_strings)}")
    arrays = {}
    for name, tensor in state.items():
        try:
            arrays[name] = _as_numpy(tensor)
        except (TypeError, RuntimeError) as e:  # sparse, quantized, float8: not supported by NumPy
            raise InputError(f"{path}: {name} cannot be read: {tensor.dtype}, {tensor.layout}") from e
    return arrays


def _why_unreadable(path: Path) -> str:
    """Returns the reason why PyTorch cannot read a file, judging by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(32)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if start.startswith(LEGACY_MAGIC):
        return "it is in PyTorch's format from before 1.6; load it there and torch.save it with a later version"
    if not start.startswith(b"PK\x03\x04"):
        return "it is not in torch.save's zip format"
    return "it is truncated or damaged"


def _as_numpy(tensor) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:  # torch.Tensor.numpy() does not support bfloat16
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    # The format is a length, a JSON header and the data. The safetensors package's NumPy interface reads the whole file
    # into memory and has no bfloat16, so the data are mapped here.
    try:
        with open(path, "rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            if header_size > path.stat().st_size:
                raise ValueError("header too long")
            header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        data = np.memmap(path, np.uint8, mode="r", offset=8 + header_size)
        state = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if end > len(data):
                raise ValueError("data too short")
            state[name] = data[begin:end].view(SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return state
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, OSError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read: it is truncated or not in the safetensors format") from e


def write_bin(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes pytorch_model.bin in torch.save's zip format, as published."""
    torch = _torch("writing pytorch_model.bin")
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
    """Returns whether no value is NaN or infinite. Works in blocks that stay in the processor's cache."""
    flat = array.reshape(-1)
    block = 1 << 18
    return all(np.isfinite(flat[i : i + block]).all() for i in range(0, flat.size, block))


def is_float(array: np.ndarray) -> bool:
    """Returns whether the dtype is floating point, bfloat16 included."""
    return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16


def _torch(purpose: str):
    """Imports PyTorch, which is optional. Raises InputError if it is not installed."""
    try:
        import torch
    except ImportError:
        raise InputError(f"{purpose} needs PyTorch: pip install 'davae-jax[torch]'") from None
    return torch
